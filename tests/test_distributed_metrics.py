"""Metrics of a run for Prometheus."""

from __future__ import annotations

from pathlib import Path

import pytest

from apacs_ray.config.settings import DataSettings, Settings
from apacs_ray.data.rejects import Reject
from apacs_ray.data.shards import Receipt
from apacs_ray.distributed.metrics import RunMetrics
from apacs_ray.distributed.session import RaySession
from apacs_ray.errors import ApacsError
from apacs_ray.runs.run import Run
from apacs_ray.stages.ingest import Ingest
from apacs_ray.stages.ingest_result import UnitCounts, WrittenTiles
from apacs_ray.stages.source import Source
from apacs_ray.stages.stage import run_stage
from apacs_ray.storage import LocalStore


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def value(metrics: RunMetrics, name: str, **tags: str) -> float:
    return metrics.totals[name, tuple(tags.items())]


class FakeMetric:
    """Records what Prometheus would be given."""

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        FAKES[name] = self

    def inc(self, more: float, tags: dict[str, str]) -> None:
        assert more > 0  # Ray refuses others
        key = tuple(tags.values())
        self.values[key] = self.values.get(key, 0.0) + more

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.values[tuple(tags.values())] = value


FAKES: dict[str, FakeMetric] = {}


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeMetric]:
    FAKES.clear()
    for kind in ("Counter", "Gauge"):
        monkeypatch.setattr(f"ray.util.metrics.{kind}", FakeMetric)
    return FAKES


def test_what_was_done_before_ray_started_is_counted_too(exported: dict[str, FakeMetric]) -> None:
    metrics = RunMetrics()
    metrics.running("ingest", now=True)
    for done in (0, 30, 30):
        metrics.rows("ingest", "tiles", done)
    metrics.open()
    metrics.rows("ingest", "tiles", 70)
    metrics.rejects("ingest", 2)
    metrics.running("ingest", now=False)
    metrics.close()
    metrics.rows("ingest", "tiles", 90)  # Ray is gone
    assert exported["apacs_ray_rows"].values == {("ingest", "tiles"): 70}
    assert exported["apacs_ray_rejects"].values == {("ingest",): 2}
    assert exported["apacs_ray_stage_running"].values == {("ingest",): 0}
    assert value(metrics, "rows", stage="ingest", what="tiles") == 90


def test_a_counter_only_grows_when_work_of_the_same_name_begins_anew(exported: dict[str, FakeMetric]) -> None:
    """`heatmaps.folds` trains networks of the same names again and again."""
    metrics = RunMetrics()
    metrics.open()
    for _ in range(2):
        for done in (0, 100, 200):
            metrics.rows("heatmaps", "fcn8", done)
    metrics.close()
    assert exported["apacs_ray_rows"].values == {("heatmaps", "fcn8"): 400}


def test_rejects_count_units_and_tiles_also_where_they_are_too_many(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    for name in ("train/input/a.png", "train/groundtruth/a.png"):
        (data / name).parent.mkdir(parents=True)
        (data / name).touch()
    reject = Reject("u", None, None, None, "ingest", "code", "reason")
    receipt = Receipt("tiles/split=train/0.parquet", 7, 4, {}, [vars(reject)] * 3)
    units = UnitCounts(4, 2, 2)
    written = WrittenTiles("pairs", units, [reject, reject], [receipt], 7, "image", defects=[reject])
    monkeypatch.setattr("apacs_ray.stages.ingest.ingest_folder", lambda *_: written)
    run = Run.open(store.child("run"), Settings(data=DataSettings(max_rejects="0")), str(data))
    ray = RaySession(run)
    with pytest.raises(ApacsError, match="2 of 4 pairs rejected"):
        run_stage(run, ray, Ingest(Source.of(run.store, run.data, run.settings)))
    run.close()
    assert value(ray.metrics, "rejects", stage="ingest") == 5
