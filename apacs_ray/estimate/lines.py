"""The lines of an estimate: the seconds of each stage of a run, computed from measured seconds a tile.

On CPUs, work is core-seconds: runs at the same time end no sooner than all their work fits on the cores. On GPUs, work
is seconds of a device, which runs with shares of one use in turn. The seconds in which Ray starts workers are
constants, measured with small runs on two cores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from apacs_ray.config.sweep import Sweep
from apacs_ray.distributed.resource_plan import NetworkPlan, TrainingPlan

# s that Ray itself takes
RUN, RUN_AT_LEAST = (
    50.0,
    15.0,
)  # core-seconds to start a run of Ray Train, which cores share; s with any number of cores
SWEEP, TRIAL = 10.0, 8.0  # Ray Tune, and each of its trials
POOL = 8.0  # a pool of actors on Ray Data
REPORT = 20.0  # intervals, figures, and an actor that draws tiles


@dataclass(frozen=True)
class Line:
    """The estimate of one stage.

    Attributes:
        stage: Its name.
        tiles: In training, one in each epoch of each network.
        each: Seconds of a tile on its device.
        cpu_seconds: Core-seconds of all.
        gpu_seconds: Device-seconds of all.
        size: Bytes written.
        wall: Seconds from start to end.
    """

    stage: str
    tiles: int
    each: float
    cpu_seconds: float
    gpu_seconds: float
    size: float
    wall: float

    def times(self, factor: float) -> Line:
        """Return the line of the same work done `factor` times, one after the other."""
        return replace(
            self,
            tiles=round(self.tiles * factor),
            cpu_seconds=self.cpu_seconds * factor,
            gpu_seconds=self.gpu_seconds * factor,
            wall=self.wall * factor,
        )


@dataclass(frozen=True)
class Tiles:
    """Tiles by split, and the mean bytes of one as stored."""

    train: int
    val: int
    test: int
    size: float

    @property
    def all(self) -> int:
        """Tiles of all splits."""
        return self.train + self.val + self.test

    def at_most(self, most: Mapping[str, int]) -> Tiles:
        """Return these, but of each split no more than `most` says."""
        return replace(self, **{split: min(count, getattr(self, split)) for split, count in most.items()})


@dataclass(frozen=True)
class Seconds:
    """Seconds of one tile in training: a step on its crop, validation on the whole tile, reading it from a shard."""

    train: float
    validate: float
    load: float


def tiling(tiles: Tiles, each: float, opening: float, *, shard: int, cpus: float) -> Line:
    """Estimate ingest.

    Args:
        tiles: By split.
        each: Core-seconds of a tile.
        opening: Core-seconds of opening all sources.
        shard: Tiles of a task.
        cpus: Cores.

    Returns:
        The line of ingest.
    """
    work = opening + tiles.all * each
    wall = opening / cpus + each * _fullest(tiles.all, shard, max(1, int(cpus)))
    return Line("ingest", tiles.all, each, work, 0.0, tiles.all * tiles.size, wall)


def _fullest(tiles: int, shard: int, places: int) -> float:
    """Return the tiles of the worker that gets most of them, when shards are dealt out to `places` workers."""
    shards = math.ceil(tiles / shard)
    return math.ceil(shards / places) * tiles / max(1, shards)


def training(
    stage: str, tiles: Tiles, epochs: int, seconds: Sequence[Seconds], plan: TrainingPlan, cpus: float
) -> Line:
    """Estimate a stage that trains networks.

    Args:
        stage: Its name.
        tiles: By split.
        epochs: Of each network.
        seconds: Of a tile on one worker, in the order of the networks.
        plan: Which networks train in which run, with which resources.
        cpus: Cores of all machines.

    Returns:
        The line of the stage.
    """
    runs = plan.runs(seconds)
    walls = [_run(tiles, epochs, group, network) for group, network in runs]
    on_gpus = any(network.gpus for _, network in runs)
    at_once = plan.mode == "parallel"
    work = [
        wall * network.workers * (1 if on_gpus else network.threads)
        for wall, (_, network) in zip(walls, runs, strict=True)
    ]
    wall = max(walls) if at_once else sum(walls)
    if on_gpus:
        wall = max(_on_shared_gpus(walls, runs), sum(work) / math.ceil(_gpus(runs)))
    else:
        wall = max(wall, sum(work) / cpus)
    reserved = sum(wall * network.workers * network.cpus for wall, (_, network) in zip(walls, runs, strict=True))
    starts = max(RUN_AT_LEAST * (1 if at_once else len(runs)), RUN * len(runs) / cpus)
    seen = tiles.train * epochs * len(seconds)
    return Line(
        stage,
        seen,
        sum(one.train for one in seconds) / len(seconds),
        reserved if on_gpus else sum(work),
        sum(work) if on_gpus else 0.0,
        0.0,
        starts + wall,
    )


Runs = Sequence[tuple[Sequence[Seconds], NetworkPlan]]


def _gpus(runs: Runs) -> float:
    return sum(network.workers * network.gpus for _, network in runs)


def _on_shared_gpus(walls: Sequence[float], runs: Runs) -> float:
    """Return when runs on GPUs end: those with a small share of one delay those that have the rest of it."""
    small = [wall for wall, (_, network) in zip(walls, runs, strict=True) if network.gpus <= 0.5]
    large = [wall for wall, (_, network) in zip(walls, runs, strict=True) if network.gpus > 0.5]
    return max(large, default=0.0) + sum(small)


def _run(tiles: Tiles, epochs: int, seconds: Sequence[Seconds], network: NetworkPlan) -> float:
    """Return the seconds of a run: networks stepped one after the other on tiles that are read once for all of them."""
    train, validate = (sum(getattr(one, part) for one in seconds) for part in ("train", "validate"))
    load = seconds[0].load
    if network.gpus:  # read meanwhile, by tasks on the CPUs, or by threads of a worker that decodes alone
        meanwhile = load / max(1, network.data_tasks or network.threads)
        train, validate = max(train, meanwhile), max(validate, meanwhile)
    else:  # on the same cores
        train, validate = train + load, validate + load
    return epochs * (tiles.train * train + tiles.val * validate) / network.workers


def pool(
    stage: str,
    tiles: int,
    each: float,
    *,
    shard: int,
    actors: int,
    gpus: float,
    threads: int,
    size: float,
) -> Line:
    """Estimate a stage in which a pool of actors works on tiles, a shard at a time.

    Args:
        stage: Its name.
        tiles: Of all splits.
        each: Seconds of a tile on one actor.
        shard: Tiles of a shard.
        actors: How many work at the same time.
        gpus: Of each actor.
        threads: Cores of each actor.
        size: Bytes written for a tile.

    Returns:
        The line of the stage.
    """
    work = tiles * each
    wall = POOL + each * _fullest(tiles, shard, actors)
    return Line(stage, tiles, each, work * threads, work * gpus, tiles * size, wall)


def sweep(plan: Sweep, tiles: Tiles, seconds: Seconds, *, concurrency: int, network: NetworkPlan) -> Line:
    """Estimate the sweep, in which every trial trains for an epoch or more in a process of its own.

    Args:
        plan: The sweep's file.
        tiles: By split.
        seconds: Of a tile on one worker.
        concurrency: Trials at the same time.
        network: Resources of one trial.

    Returns:
        The line of `tune_fusion`.
    """
    epochs = sweep_epochs(plan)
    each = _run(tiles, 1, [seconds], network)
    if network.gpus:  # those that share a GPU use it in turn
        on_gpu = math.floor(1 / network.gpus + 1e-9)
        device = tiles.train * seconds.train + tiles.val * seconds.validate
        each = max(each, min(on_gpu, concurrency * network.workers) * device / network.workers)
    work = epochs * each * network.workers
    wall = SWEEP + (plan.trials_in_all * TRIAL + epochs * each) / concurrency
    cpu_seconds, gpu_seconds = work * network.cpus, work * network.gpus
    return Line("tune_fusion", round(epochs * tiles.train), seconds.train, cpu_seconds, gpu_seconds, 0.0, wall)


def sweep_epochs(plan: Sweep) -> float:
    """Count the epochs of all trials. ASHA lets about one in `reduction_factor` go on at each rung, one at least."""
    if plan.scheduler.kind != "async_hyperband":
        return float(plan.trials_in_all * plan.epochs)
    factor, rung = plan.scheduler.reduction_factor, min(plan.scheduler.grace_period, plan.epochs)
    total, trials = float(plan.trials_in_all * rung), float(plan.trials_in_all)
    while rung < plan.epochs:
        following = min(math.ceil(rung * factor), plan.epochs)
        trials = max(1.0, trials / factor)
        total += trials * (following - rung)
        rung = following
    return total
