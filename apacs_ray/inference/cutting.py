"""How slides are cut, chosen once: the size of the cores follows from the memory of what runs the networks."""

from __future__ import annotations

from apacs_ray.config.settings import SegmentSettings
from apacs_ray.inference.model_files import ModelFiles
from apacs_ray.inference.planning import Cutting

GIB = 1 << 30
CORES = (4096, 2048, 1024, 512)  # px, the largest first
BYTES_A_PIXEL = 640  # of a window, at width 1 in float32: what FCN-8's first block holds at a time, and some
SHARD_BYTES = 96 << 20  # of windows that are one block on their way
GPU_NOT_SEEN = 16 * GIB  # memory of a GPU that is on another machine than this one, assumed


def choose_cutting(settings: SegmentSettings, models: ModelFiles, *, workers: int, on_gpus: bool) -> Cutting:
    """Choose sizes: the core once, from the memory of a worker; a slide that was begun keeps what its plan says.

    Args:
        settings: Of the segmentation.
        models: That segment.
        workers: That run the networks; without GPUs they share the memory of this machine.
        on_gpus: Whether each has a GPU.

    Returns:
        How slides are cut.
    """
    halo = models.halo if settings.halo is None else settings.halo
    core = settings.core or _largest_core(settings, models, halo, worker_memory(workers, on_gpus=on_gpus), on_gpus)
    return Cutting(settings.mpp or models.mpp, core, halo, cores_a_shard(core, halo), settings.tissue)


def cores_a_shard(core: int, halo: int) -> int:
    """Return how many windows of cores of `core` px make a block."""
    return max(1, SHARD_BYTES // (3 * (core + 2 * halo) ** 2))


def worker_memory(workers: int, *, on_gpus: bool) -> float:
    """Return the bytes of memory of a GPU; without GPUs those of this machine that each of `workers` has."""
    import psutil

    if not on_gpus:
        return float(psutil.virtual_memory().total / workers)
    import torch

    return float(torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else GPU_NOT_SEEN)


def window_memory(settings: SegmentSettings, models: ModelFiles, core: int, halo: int) -> float:
    """Return the bytes that a worker needs for the window of a core, about."""
    width = max(spec.width for spec in models.specs.values())
    each = BYTES_A_PIXEL * max(width, 0.125) * (0.5 if settings.precision == "bfloat16" else 1)
    return (core + 2 * halo) ** 2 * each


def _largest_core(settings: SegmentSettings, models: ModelFiles, halo: int, memory: float, on_gpus: bool) -> int:
    """The largest core whose window fits half of a worker's memory."""
    largest = CORES[0] if on_gpus else CORES[1]  # on CPUs also small slides are to keep all workers busy
    fitting = (side for side in CORES if side <= largest and window_memory(settings, models, side, halo) <= memory / 2)
    return next(fitting, CORES[-1])
