"""The stages of a run in their order, and which results each of them starts from."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any, TypeVar

from apacs_ray.distributed.session import RaySession
from apacs_ray.models.pretrained import require_pretrained
from apacs_ray.runs.run import Run
from apacs_ray.stages.evaluate import Evaluate
from apacs_ray.stages.heatmaps import StoreHeatmaps
from apacs_ray.stages.ingest import Ingest
from apacs_ray.stages.source import Source
from apacs_ray.stages.stage import Committed, Stage, StageResult, require_stage, run_stage
from apacs_ray.stages.train_fusion import TrainFusion
from apacs_ray.stages.train_members import TrainMembers
from apacs_ray.stages.tune_fusion import TuneFusion
from apacs_ray.storage import Store

STAGES: tuple[type[Stage[Any]], ...] = (Ingest, TrainMembers, StoreHeatmaps, TuneFusion, TrainFusion, Evaluate)
R = TypeVar("R", bound=StageResult)


def stages_of(script: str) -> list[str]:
    """Return the names of the stages that a script of `pipelines/` does; `full.py` does all."""
    return [stage.name for stage in STAGES if script in ("full.py", stage.script)]


def run_pipeline(run: Run, ray: RaySession, names: Collection[str]) -> None:
    """Do the stages called `names`, and take over from earlier commands what they start from.

    Raises:
        ApacsError: when a stage before them is not committed with these settings.
    """
    left, order = set(names), [stage.name for stage in STAGES]

    def settle(stage: Stage[R]) -> Committed[R]:
        if stage.name not in names:
            return require_stage(run, stage)
        left.discard(stage.name)
        return run_stage(run, ray, stage, order[order.index(stage.name) + 1 :])

    source = Source.of(run.store, run.data, run.settings)
    if left - {Ingest.name}:
        source.require_training_splits()
        require_pretrained(run.settings)
    ingest = settle(Ingest(source))
    if not left:
        return
    members = settle(TrainMembers(ingest))
    if not left:
        return
    heatmaps = settle(StoreHeatmaps(ingest, members))
    if not left:
        return
    sweep = settle(TuneFusion(ingest, heatmaps)) if run.settings.fusion.from_best else None
    left.discard(TuneFusion.name)
    if not left:
        return
    fusion = settle(TrainFusion(ingest, heatmaps, sweep))
    if not left:
        return
    settle(Evaluate(ingest, members, sweep, fusion))


def read_metrics(store: Store) -> dict[str, dict[str, Any]]:
    """Return the figures of a committed evaluation."""
    metrics: dict[str, dict[str, Any]] = json.loads(store.read("evaluation/metrics.json"))
    return metrics
