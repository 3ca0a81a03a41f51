"""Curves for TensorBoard, and metrics for Prometheus."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboardX.crc32c import crc32c

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
from apacs_ray.training.history import EpochRecord
from apacs_ray.training.tensorboard import read_events, write_curves, write_metrics

PATH = "tensorboard/members/fcn8/events.out.tfevents.curves"


def epochs(count: int, seconds: float = 2.0) -> tuple[EpochRecord, ...]:
    losses = [(epoch, 1 / (1 + epoch)) for epoch in range(count)]
    return tuple(
        EpochRecord(epoch, loss, 0.5, 2 * loss, 0.1 * epoch or math.nan, 1e-3, seconds) for epoch, loss in losses
    )


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def curve(store: LocalStore, tag: str) -> list[tuple[int, float]]:
    events = read_events(store.read(PATH))
    values = [(event.step, value) for event in events for value in event.summary.value]
    return [(step, round(value.simple_value, 6)) for step, value in values if value.tag == tag]


def test_every_epoch_has_its_point_and_an_undefined_dice_none(store: LocalStore) -> None:
    write_curves(store, "members/fcn8", epochs(3))
    assert curve(store, "loss/val") == [(0, 2.0), (1, 1.0), (2, 0.666667)]
    assert curve(store, "Dice/val") == [(1, 0.1), (2, 0.2)]


def test_a_longer_history_begins_with_the_same_bytes(store: LocalStore) -> None:
    """TensorBoard goes on reading where it stopped."""
    write_curves(store, "members/fcn8", epochs(2), {"lr": 0.1})
    before = store.read(PATH)
    write_curves(store, "members/fcn8", epochs(5), {"lr": 0.1})
    after = store.read(PATH)
    assert after.startswith(before)
    assert len(after) > len(before)


def test_a_new_training_in_the_same_folder_begins_anew(store: LocalStore) -> None:
    write_curves(store, "members/fcn8", epochs(5, seconds=1000))
    old = read_events(store.read(PATH))[0].wall_time
    write_curves(store, "members/fcn8", epochs(1))
    assert read_events(store.read(PATH))[0].wall_time > old
    assert curve(store, "loss/train") == [(0, 1.0)]


def test_every_model_has_its_test_metrics(store: LocalStore) -> None:
    """An undefined one is left out, as in `metrics.json`."""
    row = {"dice": 0.9, "iou": None, "accuracy": 0.97, "boundary_iou": 0.5, "tp": 3}
    write_metrics(store, {"fusion": row, "otsu": row | {"dice": 0.7}})
    found = {}
    for model in ("fusion", "otsu"):
        events = read_events(store.read(f"tensorboard/evaluation/{model}/events.out.tfevents.curves"))
        found[model] = {value.tag: round(value.simple_value, 6) for event in events for value in event.summary.value}
    assert found["fusion"] == {"test/Dice": 0.9, "test/accuracy": 0.97, "test/boundary IoU": 0.5}
    assert found["otsu"]["test/Dice"] == 0.7


def test_records_carry_their_checksums_and_a_cut_file_gives_its_whole_events(store: LocalStore) -> None:
    write_curves(store, "members/fcn8", epochs(2), {"head": "refined", "lr": 0.1})
    content = store.read(PATH)
    length = int.from_bytes(content[:8], "little")
    crc = crc32c(content[:8])
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    assert int.from_bytes(content[8:12], "little") == masked
    assert content[12 : 12 + length] == read_events(content)[0].SerializeToString()
    ends = (len(content), len(content) - 1, 16 + length, 11)
    assert [len(read_events(content[:end])) for end in ends] == [4, 3, 1, 0]
    setting = read_events(content)[1].summary.value[0]
    assert setting.tag.startswith("setting")
    assert b"| head | refined |" in setting.tensor.string_val[0]


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
