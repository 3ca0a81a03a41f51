"""The memory that networks need to predict, about: what sizes of windows and numbers of workers follow from."""

from __future__ import annotations

GIB = 1 << 30
BYTES_A_PIXEL = 640  # of a window, at width 1 in float32: what FCN-8's first block holds at a time, and some
BYTES_A_PROCESS = 3 * GIB  # on a GPU, at width 1: three members and a fusion in float32, CUDA's own, and some
MARGIN = 200  # px that the networks add to a side
GPU_NOT_SEEN = 16 * GIB  # memory of a GPU that is on another machine than this one, assumed


def worker_memory(workers: int, *, on_gpus: bool) -> float:
    """Return the bytes of memory of a GPU; without GPUs those of this machine that each of `workers` has."""
    import psutil

    if not on_gpus:
        return float(psutil.virtual_memory().total / workers)
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else GPU_NOT_SEEN)


def pixel_bytes(width: float, precision: str) -> float:
    """Return the bytes a px of a window that networks of `width` need while they see it."""
    return BYTES_A_PIXEL * max(width, 0.125) * (0.5 if precision == "bfloat16" else 1)


def workers_a_gpu(side: int, width: float, precision: str) -> int:
    """Return how many processes that predict tiles of `side` px one GPU's memory holds, at least 1."""
    each = BYTES_A_PROCESS * max(width, 0.2) + (side + MARGIN) ** 2 * pixel_bytes(width, precision)
    return max(1, int(0.9 * worker_memory(1, on_gpus=True) / each))
