"""The device of a training or inference process: which it is, what it is called, what it computes fast."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

import torch


def default_device() -> torch.device:
    """Return the GPU that torch takes first, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Return whether to autocast to bfloat16. `auto`: on GPUs and CPUs that have its arithmetic."""
    if precision == "auto":
        if device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported())
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return precision == "bfloat16"


def describe_device(device: torch.device) -> str:
    """Return the device's name, for people who judge a run's times and numbers."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # Linux only; elsewhere the architecture must do
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU, {line.partition(':')[2].strip()}"
    return f"CPU, {platform.machine()}"
