"""The stages of the pipeline, in order."""

from __future__ import annotations

from apacs_ray.stages.ingest import INGEST
from apacs_ray.stages.train_members import TRAIN_MEMBERS

STAGES = (INGEST, TRAIN_MEMBERS)


def read_metrics(store):
    return None
