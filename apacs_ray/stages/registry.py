"""The stages of the pipeline, in order."""

from __future__ import annotations

import json
from typing import Any

from apacs_ray.stages.evaluate import EVALUATE
from apacs_ray.stages.heatmaps import HEATMAPS
from apacs_ray.stages.ingest import INGEST
from apacs_ray.stages.train_fusion import TRAIN_FUSION
from apacs_ray.stages.train_members import TRAIN_MEMBERS
from apacs_ray.stages.tune_fusion import TUNE_FUSION
from apacs_ray.storage import Store

STAGES = (INGEST, TRAIN_MEMBERS, HEATMAPS, TUNE_FUSION, TRAIN_FUSION, EVALUATE)


def read_metrics(store: Store) -> dict[str, dict[str, Any]]:
    """The figures of a committed evaluation."""
    metrics: dict[str, dict[str, Any]] = json.loads(store.read("evaluation/metrics.json"))
    return metrics
