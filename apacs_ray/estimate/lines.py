"""What each stage of a run will take, from measured seconds a tile: pure arithmetic.

On CPUs, work is core-seconds: runs at the same time end no sooner than all their work fits on the cores. On GPUs, work
is seconds of a device, which runs with shares of one have in turn. What Ray takes to start things is told in constants:
small runs on two cores were measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from apacs_ray.config.sweep import Sweep
from apacs_ray.distributed.resource_plan import NetworkPlan, TrainingPlan

# s of Ray's own, of a core where cores share them
RUN, RUN_AT_LEAST = 50.0, 15.0  # each run of Ray Train; with any number of cores
SWEEP, TRIAL = 10.0, 8.0  # Ray Tune, and each of its trials
POOL = 8.0  # a pool of actors on Ray Data
REPORT = 20.0  # intervals, figures, and an actor that draws tiles


@dataclass(frozen=True)
class Line:
    """One stage: how many tiles (in training, one in each epoch of each network), and what they come to."""

    stage: str
    tiles: int
    each: float  # s of a tile on its device
    cpu_seconds: float
    gpu_seconds: float
    size: float  # bytes written
    wall: float  # s

    def times(self, factor: float) -> Line:
        """The same work `factor` times, one after the other."""
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
        return self.train + self.val + self.test


@dataclass(frozen=True)
class Seconds:
    """What one tile costs in training, s: a step that learns from its crop, a look at it whole, and reading it."""

    train: float
    validate: float
    load: float


def tiling(tiles: Tiles, each: float, opening: float, *, shard: int, cpus: float) -> Line:
    """Ingest on `cpus`: `opening` core-seconds for all sources, then tiles in `each` s, a `shard` of them a task."""
    work = opening + tiles.all * each
    wall = opening / cpus + each * _fullest(tiles.all, shard, max(1, int(cpus)))
    return Line("ingest", tiles.all, each, work, 0.0, tiles.all * tiles.size, wall)


def _fullest(tiles: int, shard: int, places: int) -> float:
    """Tiles of the place that gets most of them, when shards are dealt out."""
    shards = math.ceil(tiles / shard)
    return math.ceil(shards / places) * tiles / max(1, shards)


def training(
    stage: str, tiles: Tiles, epochs: int, seconds: Sequence[Seconds], plan: TrainingPlan, cpus: float
) -> Line:
    """Networks that learn for `epochs`; network i costs `seconds[i]` on one worker of its run."""
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
    """When runs on GPUs end: those with a small share of one hold up whoever has the rest of it."""
    small = [wall for wall, (_, network) in zip(walls, runs, strict=True) if network.gpus <= 0.5]
    large = [wall for wall, (_, network) in zip(walls, runs, strict=True) if network.gpus > 0.5]
    return max(large, default=0.0) + sum(small)


def _run(tiles: Tiles, epochs: int, seconds: Sequence[Seconds], network: NetworkPlan) -> float:
    """Seconds of one run: networks stepped one after the other on tiles that are read once for all of them."""
    train, validate = (sum(getattr(one, what) for one in seconds) for what in ("train", "validate"))
    load = seconds[0].load
    if network.gpus:  # read on the side
        aside = load / max(1, network.data_tasks)
        train, validate = max(train, aside), max(validate, aside)
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
    """Tiles through a pool of `actors`, a tile in `each` s on `gpus` or `threads` cores of each, a shard at a time."""
    work = tiles * each
    wall = POOL + each * _fullest(tiles, shard, actors)
    return Line(stage, tiles, each, work * threads, work * gpus, tiles * size, wall)


def sweep(plan: Sweep, tiles: Tiles, seconds: Seconds, *, concurrency: int, network: NetworkPlan) -> Line:
    """Trials that learn for an epoch or more each; every trial is a process of its own."""
    epochs = sweep_epochs(plan)
    each = _run(tiles, 1, [seconds], network)
    work = epochs * each * network.workers
    wall = SWEEP + (plan.trials * TRIAL + epochs * each) / concurrency
    cpu_seconds, gpu_seconds = work * network.cpus, work * network.gpus
    return Line("tune_fusion", round(epochs * tiles.train), seconds.train, cpu_seconds, gpu_seconds, 0.0, wall)


def sweep_epochs(plan: Sweep) -> float:
    """Epochs of all trials together. ASHA lets about one in `reduction_factor` go on at each rung, one at least."""
    if plan.scheduler.kind != "async_hyperband":
        return float(plan.trials * plan.epochs)
    factor, rung = plan.scheduler.reduction_factor, min(plan.scheduler.grace_period, plan.epochs)
    total, trials = float(plan.trials * rung), float(plan.trials)
    while rung < plan.epochs:
        following = min(math.ceil(rung * factor), plan.epochs)
        trials = max(1.0, trials / factor)
        total += trials * (following - rung)
        rung = following
    return total
