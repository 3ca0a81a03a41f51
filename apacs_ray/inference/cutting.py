"""How slides are cut, chosen once: the size of the cores follows from the memory of what runs the networks."""

from __future__ import annotations

from apacs_ray.config.settings import SegmentSettings
from apacs_ray.inference.memory import pixel_bytes, worker_memory
from apacs_ray.inference.model_files import ModelFiles
from apacs_ray.inference.planning import Cutting

CORES = (4096, 2048, 1024, 512)  # px, the largest first
SHARD_BYTES = 96 << 20  # of windows that are one block on their way


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


def window_memory(settings: SegmentSettings, models: ModelFiles, core: int, halo: int) -> float:
    """Return the bytes that a worker needs for the window of a core, about."""
    width = max(spec.width for spec in models.specs.values())
    return (core + 2 * halo) ** 2 * pixel_bytes(width, settings.precision)


def _largest_core(settings: SegmentSettings, models: ModelFiles, halo: int, memory: float, on_gpus: bool) -> int:
    """The largest core whose window fits half of a worker's memory."""
    largest = CORES[0] if on_gpus else CORES[1]  # on CPUs also small slides are to keep all workers busy
    fitting = (side for side in CORES if side <= largest and window_memory(settings, models, side, halo) <= memory / 2)
    return next(fitting, CORES[-1])
