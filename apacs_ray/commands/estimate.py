"""`--estimate`: what a run will take on the cluster at hand, from a short sample, before anything is spent."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TypeVar

from rich.table import Table

from apacs_ray.config.settings import Settings
from apacs_ray.config.sweep import read_sweep
from apacs_ray.console import cell, console, say
from apacs_ray.data.folders import Pair
from apacs_ray.distributed.cluster import has_gpus
from apacs_ray.distributed.resource_plan import Cluster, NetworkPlan, TrainingPlan, plan_training
from apacs_ray.distributed.session import RaySession
from apacs_ray.distributed.tasks import ensembles_held, plan_predictors, run_in_task
from apacs_ray.distributed.trial_plan import plan_sweep
from apacs_ray.errors import ApacsError
from apacs_ray.estimate.cutting import PAIRS, SLIDES, cut_pairs, cut_slides, spread
from apacs_ray.estimate.lines import REPORT, Line, Seconds, Tiles, pool, sweep, tiling, training
from apacs_ray.estimate.networks import ASSUMED_GPU, Inference, SampleTile, Times, Training, assume, measure
from apacs_ray.models.registry import MEMBERS
from apacs_ray.models.spec import ModelSpec
from apacs_ray.runs.run import Run
from apacs_ray.slides.slide_files import SlideFiles
from apacs_ray.stages.ingest_slides import make_smears, slide_task
from apacs_ray.stages.source import Source
from apacs_ray.stages.train_fusion import fusion_specs

HOUR = 3600.0
U = TypeVar("U", Pair, SlideFiles)


def estimate(run: Run, ray: RaySession, names: Sequence[str]) -> None:
    """Say for each stage of `names` what it will take.

    Nothing is trained, and nothing but what is made or fetched anyway is kept: synthetic smears, slides in the cache.
    """
    began = time.perf_counter()
    ray.start()
    cluster = ray.cluster()
    tiles, tile, cut = _look_at_data(run, cluster, trains=set(names) != {"ingest"})
    networks = _Networks(run.settings, cluster, tiles, tile, assumed=cluster.gpus > 0 and not has_gpus())
    lines: dict[str, Callable[[], list[Line]]] = {
        "ingest": lambda: [cut],
        "train_members": lambda: [networks.members()],
        "heatmaps": networks.heatmaps,
        "tune_fusion": networks.sweep,
        "train_fusion": lambda: [networks.fusions()],
        "evaluate": lambda: [networks.evaluation()],
    }
    shown = [line for name, work in lines.items() if name in names for line in work()]
    show_lines(shown, unit="tiles")
    say("tiles of training: one in each epoch of each network")
    say_where(cluster, time.perf_counter() - began)
    if run.settings.members.patience or run.settings.fusion.patience:
        say("training that no longer gets better ends earlier (members.patience, fusion.patience)")
    if networks.assumed:
        say(f"no GPU is there yet: {ASSUMED_GPU / 1e12:.0f} TFLOP/s were assumed of each, nothing was measured")


Unit = Pair | SlideFiles


def _look_at_data(run: Run, cluster: Cluster, *, trains: bool) -> tuple[Tiles, SampleTile, Line]:
    """How many tiles there will be, one of them, and what cutting them takes."""
    settings, source = run.settings, Source.of(run.store, run.data, run.settings)
    store = source.store
    if source.is_synthetic:
        make_smears(settings, store)
    elif trains:
        source.require_training_splits()
    listed: Sequence[Unit]
    chosen: Sequence[Unit]
    if source.holds_folders:
        some = chosen_of(source.pairs, PAIRS)
        listed, chosen, cut = source.pairs, some, partial(cut_pairs, store, some, settings.tiles, settings.data)
    else:
        few = chosen_of(source.slides, SLIDES)
        listed, chosen, cut = source.slides, few, partial(cut_slides, slide_task(source, run.store, "estimate"), few)
    if not listed:
        raise ApacsError(f"{store.uri}: nothing to cut")
    sample = run_in_task(cut, cpus=min(1.0, cluster.cpus), gpus=0)
    if sample.cut.tile is None:
        raise ApacsError(f"{store.uri}: none of the {len(chosen)} that were tried gives a tile; --dry-run says why")
    count = count_tiles(listed, chosen, sample.tiles, settings.data.val_fraction)
    tiles = Tiles(*count, sample.cut.size / sample.cut.count)
    opening = sample.opening * len(listed) / len(chosen)
    shard = settings.tiles.shard
    return tiles, sample.cut.tile, tiling(tiles, sample.cut.each, opening, shard=shard, cpus=cluster.tiling_cpus)


def chosen_of(listed: Sequence[U], most: int) -> list[U]:
    """At most so many of each kind, from all over the listing."""
    kinds = sorted({kind_of(unit) for unit in listed})
    return [unit for kind in kinds for unit in spread([one for one in listed if kind_of(one) == kind], most)]


def kind_of(unit: Unit) -> str:
    """Scanners differ in how many bytes a pixel takes them."""
    return "pair" if isinstance(unit, Pair) else unit.path.rpartition(".")[2].lower()


def _weight(unit: Unit) -> int:
    """What a unit's tiles are proportional to: slides of more bytes have more."""
    return 1 if isinstance(unit, Pair) else unit.size


def count_tiles(
    listed: Sequence[Unit], chosen: Sequence[Unit], tiles: Sequence[float], val_fraction: float
) -> tuple[int, int, int]:
    """Return how many tiles there are to train, validate and test on, if all are as the chosen ones of their kind."""
    weights: dict[str, float] = defaultdict(float)
    found: dict[str, float] = defaultdict(float)
    for unit, count in zip(chosen, tiles, strict=True):
        weights[kind_of(unit)] += _weight(unit)
        found[kind_of(unit)] += count
    splits = dict.fromkeys(("train", "val", "test"), 0.0)
    for unit in listed:
        kind = kind_of(unit)
        splits[unit.split or "train"] += _weight(unit) * found[kind] / max(1, weights[kind])
    if not splits["val"]:
        splits["val"] = val_fraction * splits["train"]
        splits["train"] -= splits["val"]
    train, val, test = map(round, splits.values())
    return train, val, test


class _Networks:
    """The stages with networks: planned as a run plans them, and measured at once in one process."""

    def __init__(self, settings: Settings, cluster: Cluster, tiles: Tiles, tile: SampleTile, *, assumed: bool) -> None:
        self._settings, self._cluster, self._tiles, self._tile = settings, cluster, tiles, tile
        self.assumed = assumed
        self._member_specs = [
            ModelSpec("member", name, width=settings.members.width, dropout=settings.members.dropout)
            for name in MEMBERS
        ]
        self._fusion_specs = [spec for _, spec in fusion_specs(settings, settings.fusion).values()]
        self._member_plan = self._plan(self._member_specs, settings.members.mode)
        self._fusion_plan = self._plan(self._fusion_specs, "parallel")
        self._sweep = read_sweep(settings.tune.config)
        self._trial, self._trials = plan_sweep(self._sweep, cluster, settings.fusion.batch_size)

    def members(self) -> Line:
        """The stage that trains the members."""
        return self._trained("train_members", self._member_plan, 0)

    def fusions(self) -> Line:
        """The stage that trains the fusion, and the published one where it is compared."""
        return self._trained("train_fusion", self._fusion_plan, len(MEMBERS))

    def heatmaps(self) -> list[Line]:
        """The members on train and val tiles; with folds, their trainings before."""
        folds, tiles = self._settings.heatmaps.folds, self._tiles
        # each of `folds` trainings sees all folds but one
        trained = [self._trained("heatmaps: folds", self._member_plan, 0).times(folds - 1)] if folds > 1 else []
        return [
            *trained,
            self._pooled(
                "heatmaps",
                tiles.train + tiles.val,
                self._times.members,
                size=self._times.heatmaps,
                ensembles=ensembles_held(self._settings.heatmaps.folds),
            ),
        ]

    def sweep(self) -> list[Line]:
        """The sweep, where its result will be used."""
        if not self._settings.fusion.from_best:
            return []
        seconds, tiles = self._times.trainings[-1], self._tiles.at_most(self._settings.tune.most)
        return [sweep(self._sweep, tiles, seconds, concurrency=self._trials, network=self._trial)]

    def evaluation(self) -> Line:
        """Everything on the test tiles, and the report."""
        line = self._pooled("evaluate", self._tiles.test, self._times.everything, size=0.0)
        return replace(line, wall=line.wall + REPORT)

    @cached_property
    def _times(self) -> Times:
        trainings = [
            *self._trainings(self._member_specs, self._member_plan),
            *self._trainings(self._fusion_specs, self._fusion_plan),
            self._training(self._fusion_specs[0], self._trial),
        ]
        how = self._settings.evaluate
        fusions = {spec.name: spec for spec in self._fusion_specs}
        inference = Inference(fusions, self._settings.members.width, how.threads, how.precision)
        work = partial(assume if self.assumed else measure, self._tile, trainings, inference)
        gpus = 1.0 if self._cluster.gpus and not self.assumed else 0.0
        return run_in_task(work, cpus=min(1.0, self._cluster.cpus), gpus=gpus)

    def _plan(self, specs: Sequence[ModelSpec], mode: str) -> TrainingPlan:
        how = self._settings.members if specs is self._member_specs else self._settings.fusion
        names = [spec.name for spec in specs]
        return plan_training(names, self._cluster, workers=how.workers, batch_size=how.batch_size, mode=mode)  # type: ignore[arg-type]

    def _trainings(self, specs: Sequence[ModelSpec], plan: TrainingPlan) -> list[Training]:
        networks = [network for group, network in plan.runs(specs) for _ in group]
        return [self._training(spec, network) for spec, network in zip(specs, networks, strict=True)]

    def _training(self, spec: ModelSpec, network: NetworkPlan) -> Training:
        how = self._settings.members if spec.kind == "member" else self._settings.fusion
        return Training(spec, how, network.threads, network.workers)

    def _trained(self, stage: str, plan: TrainingPlan, first: int) -> Line:
        how = self._settings.members if first == 0 else self._settings.fusion
        count = len(MEMBERS) if first == 0 else len(self._fusion_specs)
        seconds: Sequence[Seconds] = self._times.trainings[first : first + count]
        return training(stage, self._tiles, how.epochs, seconds, plan, self._cluster.cpus)

    def _pooled(self, stage: str, tiles: int, each: float, *, size: float, ensembles: int = 1) -> Line:
        shards = math.ceil(tiles / self._settings.tiles.shard)
        plan = plan_predictors(self._cluster, self._settings, shards, ensembles=ensembles)
        return pool(
            stage,
            tiles,
            each,
            shard=self._settings.tiles.shard,
            actors=plan.actors,
            gpus=plan.gpus,
            threads=self._settings.evaluate.threads,
            size=size,
        )


def say_where(cluster: Cluster, seconds: float) -> None:
    """Say on what the estimate is, and how long the sample took."""
    there = f"{cluster.cpus:.0f} CPUs" + (f" and {cluster.gpus:g} GPUs" if cluster.gpus else "")
    say(f"on {there}, from a sample of {seconds:.0f} s; nodes that have to start come on top")


def show_lines(lines: Sequence[Line], *, unit: str, wall: float | None = None) -> None:
    """Print a table of stages; in all it takes `wall` s, or one stage after the other."""
    table = Table(title="estimate", title_justify="left")
    for heading in ("stage", unit, "ms each", "CPU h", "GPU h", "GB", "wall time"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for line in lines:
        table.add_row(cell(line.stage), str(line.tiles), f"{1000 * line.each:.0f}", *_sums([line]))
    table.add_section()
    *sums, one_by_one = _sums(lines)
    table.add_row("in all", "", "", *sums, one_by_one if wall is None else _duration(wall))
    console.print(table)


def _sums(lines: Sequence[Line]) -> list[str]:
    cpu, gpu, size, wall = (
        sum(getattr(line, what) for line in lines) for what in ("cpu_seconds", "gpu_seconds", "size", "wall")
    )
    return [f"{cpu / HOUR:.2f}", f"{gpu / HOUR:.2f}", f"{size / 1e9:.2f}", _duration(wall)]


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < HOUR:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / HOUR:.1f} h"
