"""The memory that networks need to predict, about: what sizes of windows and numbers of workers follow from."""

from __future__ import annotations

GIB = 1 << 30
BYTES_A_PIXEL = 640  # of a window, at width 1 in float32: what FCN-8's first block holds at a time, and some
BYTES_A_PROCESS = 3 * GIB  # on a GPU, at width 1: three members and a fusion in float32, CUDA's own, and some
BYTES_AN_ENSEMBLE = 2 * GIB  # of those the weights, at width 1; they go with the square of the width
USABLE = 0.9  # of a GPU's memory
BUSY_PIXELS = 8 << 20  # of a batch: two tiles of 2000 px; beyond some 4 Mpx an H100 trains no faster a px
MOST_TILES = 16  # of a batch; each waits decoded in the host's memory
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


def tiles_a_batch(side: int, width: float, precision: str, *, ensembles: int = 1) -> int:
    """Return how many tiles of `side` px pass the networks together on a GPU, at least 1.

    As many as keep it busy, of which its memory holds one process. It does not depend on how many processes share the
    GPU: tiles pass in the same batches however they are spread.
    """
    left = USABLE * worker_memory(1, on_gpus=True) - _process_bytes(width, ensembles)
    fits = int(left / _tile_bytes(side, width, precision))
    return max(1, min(MOST_TILES, round(BUSY_PIXELS / side**2), fits))


def workers_a_gpu(side: int, width: float, precision: str, batch: int = 1, *, ensembles: int = 1) -> int:
    """Return how many processes one GPU's memory holds that predict `batch` tiles of `side` px together, at least 1.

    Each of them holds so many `ensembles`.
    """
    each = _process_bytes(width, ensembles) + batch * _tile_bytes(side, width, precision)
    return max(1, int(USABLE * worker_memory(1, on_gpus=True) / each))


def _process_bytes(width: float, ensembles: int) -> float:
    return BYTES_A_PROCESS * max(width, 0.2) + (ensembles - 1) * BYTES_AN_ENSEMBLE * width**2


def _tile_bytes(side: int, width: float, precision: str) -> float:
    return (side + MARGIN) ** 2 * pixel_bytes(width, precision)
