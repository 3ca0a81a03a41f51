"""The device of a training or inference process: which it is, what it is called, and in which numbers it computes."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path

import torch


def default_device() -> torch.device:
    """Return the GPU that torch takes first, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def set_arithmetic(precision: str, *, deterministic: bool = False) -> None:
    """Hold this process to what `precision` says: float32 is IEEE float32, and TF32 is so called.

    Left alone, cuDNN computes convolutions of float32 with TF32's 10 bits of mantissa.

    Args:
        precision: Of the settings: `auto`, `float32`, `tf32` or `bfloat16`.
        deterministic: On GPUs only algorithms that give the same bits each time, where torch has them; slower.
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS starts
        torch.use_deterministic_algorithms(True, warn_only=True)


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Return whether to autocast to bfloat16. `auto`: on GPUs and CPUs that have its arithmetic, not emulated."""
    if precision == "auto":
        if device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return precision == "bfloat16"


def describe_arithmetic(precision: str, device: torch.device) -> str:
    """Return the name of the numbers in which networks compute on `device`, for people: `auto` is told apart."""
    if uses_bfloat16(precision, device):
        return "bfloat16"
    return "tf32" if precision == "tf32" and device.type == "cuda" else "float32"


def describe_device(device: torch.device) -> str:
    """Return the device's name, for people who judge a run's times and numbers."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # Linux only; elsewhere the architecture must do
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU, {line.partition(':')[2].strip()}"
    return f"CPU, {platform.machine()}"
