"""Checks of GPUs, their driver, and the precision that the CPU computes fast."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from apacs_ray.config.settings import Settings
from apacs_ray.doctor.finding import Finding, message_of

DRIVER = Path("/proc/driver/nvidia/version")
GIB = 1 << 30


def check_gpus(settings: Settings, driver_file: Path = DRIVER) -> Iterator[Finding]:
    """Check that each GPU computes, a line each; without one, say why a run uses the CPU."""
    import torch

    with warnings.catch_warnings(record=True) as caught:  # torch puts an unusable driver into a warning
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if not usable:
        yield _no_gpu([" ".join(str(warning.message).split()) for warning in caught], driver_file)
        return
    for number in range(torch.cuda.device_count()):
        yield _gpu(torch.device("cuda", number), settings, driver_file)


def _no_gpu(warnings_of_torch: list[str], driver_file: Path) -> Finding:
    import torch

    built = torch.version.cuda or torch.version.hip
    if "CUDA_VISIBLE_DEVICES" in os.environ and not os.environ["CUDA_VISIBLE_DEVICES"].strip("-1 "):
        return Finding("GPU", "ok", "hidden by CUDA_VISIBLE_DEVICES: runs on the CPU")
    driver = driver_version(driver_file)
    if driver is None:
        kind = f"torch is built for CUDA {built}, and there is no driver" if built else "torch is built for the CPU"
        return Finding("GPU", "ok", f"no GPU: runs on the CPU ({kind})")
    if built is None:
        advice = "install torch and torchvision built for CUDA (pytorch.org names the index)"
        return Finding("GPU", "warning", f"NVIDIA driver {driver}, but torch is built for the CPU: runs there", advice)
    reason = "; ".join(warnings_of_torch) or "torch finds no device"
    advice = (
        f"use a driver for CUDA {built} or torch built for an older CUDA; in a container, pass the GPUs (--gpus all)"
    )
    return Finding("GPU", "warning", f"driver {driver}, torch for CUDA {built}, no GPU usable: {reason}", advice)


def _gpu(device: object, settings: Settings, driver_file: Path) -> Finding:
    import torch

    from apacs_ray.training.device import uses_bfloat16

    assert isinstance(device, torch.device)
    properties = torch.cuda.get_device_properties(device)
    name = f"GPU {device.index}"
    with torch.cuda.device(device):
        bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        try:
            half = uses_bfloat16(settings.members.precision, device)
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                layer = torch.nn.Conv2d(3, 4, 3).to(device)
                layer(torch.ones(1, 3, 32, 32, device=device)).sum().backward()
            torch.cuda.synchronize()
            free = torch.cuda.mem_get_info()[0]
        except RuntimeError as error:
            advice = "nvidia-smi shows what holds the GPU; torch's build must know this GPU's compute capability"
            return Finding(name, "failed", f"{properties.name} does not compute: {message_of(error)}", advice)
    message = (
        f"{properties.name}, {free / GIB:.0f} of {properties.total_memory / GIB:.0f} GiB free, compute capability "
        f"{properties.major}.{properties.minor}, driver {driver_version(driver_file) or 'unknown'}, "
        f"torch for CUDA {torch.version.cuda or torch.version.hip}, "
        f"{'bfloat16' if bfloat16 else 'no bfloat16'}"
    )
    if not bfloat16 and settings.members.precision == "bfloat16":
        return Finding(name, "warning", message, "bfloat16 is slow here: --members.precision float32")
    return Finding(name, "ok", message)


def driver_version(file: Path = DRIVER) -> str | None:
    """Return the version of the NVIDIA kernel driver, None without one."""
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return None
    version = re.search(r"\b\d+\.\d+(?:\.\d+)*\b", text)
    return version.group(0) if version else "of unknown version"


def check_cpu(settings: Settings) -> Iterator[Finding]:
    """Check whether training on the CPU would use bfloat16, and name it."""
    import torch

    from apacs_ray.training.device import describe_device, uses_bfloat16

    device = torch.device("cpu")
    amx, avx = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    units = [name for name, there in (("AMX", amx), ("AVX512-BF16", avx)) if there]
    message = f"{describe_device(device)}; " + (f"bfloat16 by {' and '.join(units)}" if units else "no bfloat16")
    if settings.members.precision == "bfloat16" and not uses_bfloat16("auto", device):
        yield Finding("CPU", "warning", message, "bfloat16 is emulated and slow here: --members.precision auto")
    else:
        yield Finding("CPU", "ok", message)
