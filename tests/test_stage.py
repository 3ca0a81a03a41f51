"""Stages: done once, unchanged after, their results typed and their records true."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pytest

from apacs_ray.config.settings import RunSettings, Settings, TilesSettings
from apacs_ray.data.shards import Receipt, shard_path, write_table
from apacs_ray.data.tile_rows import TILE_SCHEMA
from apacs_ray.distributed.session import RaySession
from apacs_ray.errors import ApacsError, UsageError
from apacs_ray.runs.markers import Counts
from apacs_ray.runs.run import Run
from apacs_ray.stages.stage import Committed, Job, Stage, StageResult, require_stage, run_stage
from apacs_ray.stages.train_networks import TrainedNetwork, TrainingResult, read_indices, weights_hold
from apacs_ray.storage import LocalStore, Store


@dataclass(frozen=True)
class Measured(StageResult):
    means: dict[str, float]
    unit: tuple[str, ...]


@dataclass(frozen=True)
class Measure(Stage[Measured]):
    name: ClassVar[str] = "measure"
    script: ClassVar[str] = "measure.py"
    folder: ClassVar[str] = "measured"
    result_type: ClassVar[type[Measured]] = Measured

    before: Committed[StageResult]
    value: float = 1.0

    def fingerprint(self, settings: Settings) -> str:
        return f"{self.before.fingerprint}-{self.value}"

    def work(self, job: Job, fingerprint: str) -> Measured:
        job.store.write("measured/times", str(self.times(job.store) + 1).encode())
        if self.value < 0:
            raise ApacsError("nothing below 0")
        return Measured(Counts(3, 2, {"odd": 1}), {"a": self.value}, ("um", "px"))

    @staticmethod
    def times(store: Store) -> int:
        return int(store.read("measured/times")) if store.version("measured/times") else 0


class Held(Measure):
    """Whose output is a file that somebody may change."""

    def holds(self, store: Store, result: Measured) -> bool:
        return store.read("measured/times") == b"1"


FIRST = Committed("tiles", "1" * 16, StageResult(Counts(0, 0)))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    opened = Run.open(LocalStore(str(tmp_path / "run")), Settings(), None)
    yield opened
    opened.close()


def test_a_stage_is_done_once_and_its_result_comes_back_as_it_was(run: Run) -> None:
    ray = RaySession(run)
    with pytest.raises(
        ApacsError, match=r"stage measure is not done with these settings; run python pipelines/measure\.py"
    ):
        require_stage(run, Measure(FIRST))
    committed = run_stage(run, ray, Measure(FIRST))
    again = run_stage(run, ray, Measure(FIRST))
    assert committed == again == require_stage(run, Measure(FIRST))
    assert again.result == Measured(Counts(3, 2, {"odd": 1}), {"a": 1.0}, ("um", "px"))
    assert Measure.times(run.store) == 1
    assert run.stages["measure"]["state"] == "unchanged"
    assert run.committed("measured", committed.fingerprint).inputs == {"tiles": "1" * 16}  # type: ignore[union-attr]
    run_stage(run, ray, Measure(FIRST, 2.0))
    assert Measure.times(run.store) == 2


def test_what_follows_a_stage_that_is_done_anew_is_outdated(run: Run) -> None:
    for name in ("measure", "later", "evaluate"):
        run.record(name, state="done", seconds=3.0)
    with pytest.raises(ApacsError, match="nothing below 0"):
        run_stage(run, RaySession(run), Measure(FIRST, -1.0), ["later", "evaluate", "not recorded"])
    states = {name: stage["state"] for name, stage in run.stages.items()}
    assert states == {"measure": "failed", "later": "outdated", "evaluate": "outdated"}
    assert "seconds" not in run.stages["measure"]  # of the work before


def test_what_was_done_with_other_settings_is_no_claim_until_it_is_found_to_hold(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    other = Settings(run=RunSettings(seed=7))

    def states(settings: Settings, work: Callable[[Run], object]) -> dict[str, str]:
        run = Run.open(store, settings, None)
        work(run)
        run.close()
        return {name: stage["state"] for name, stage in json.loads(store.read("run.json"))["stages"].items()}

    def measure(run: Run) -> None:
        run_stage(run, RaySession(run), Measure(FIRST))

    def look(run: Run) -> None:
        require_stage(run, Measure(FIRST))
        run.write_record()

    def fail(run: Run) -> None:
        run.record("later", state="failed", error="broken")

    assert states(Settings(), measure) == {"measure": "done"}
    assert states(Settings(), Run.write_record) == {"measure": "done"}
    assert states(other, Run.write_record) == {"measure": "earlier"}
    assert states(other, look) == {"measure": "unchanged"}
    assert states(Settings(), fail) == {"measure": "earlier", "later": "failed"}
    assert states(other, measure) == {"measure": "unchanged", "later": "failed"}


def test_an_output_of_other_data_is_refused_and_replaced_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(str(tmp_path / "run"))
    (tmp_path / "a" / "cells").mkdir(parents=True)
    (tmp_path / "b" / "cells").mkdir(parents=True)
    first = Run.open(store, Settings(), str(tmp_path / "a" / "cells"))
    first.record("ingest", state="done")
    first.close()
    monkeypatch.chdir(tmp_path / "a")
    Run.open(store, Settings(), "cells").close()  # the same folder, however it is written
    monkeypatch.chdir(tmp_path / "b")
    for data in ("cells", "s3://bucket/cells", None):
        with pytest.raises(UsageError, match=r"holds a run of .*/a/cells, not of .*--run\.replace true"):
            Run.open(store, Settings(), data)
    Run.open(store, Settings(run=RunSettings(replace=True)), "cells").close()


def test_a_run_that_cannot_be_opened_is_given_back(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(OSError, match="directory"):
        Run.open(LocalStore(str(tmp_path)), Settings(), None)
    assert not (tmp_path / "run.lock").exists()


def test_the_record_of_a_setting_without_bounds_is_json_and_reads_as_the_same_settings(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    settings = Settings(tiles=TilesSettings(min_tissue_um2=math.inf))
    run = Run.open(store, settings, None)
    run.record("ingest", state="done")
    run.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"no JSON: {word}")

    record = json.loads(store.read("run.json"), parse_constant=refuse)
    assert Settings.model_validate(record["settings"]) == settings
    again = Run.open(store, settings, None)
    again.close()
    assert again.stages["ingest"]["state"] == "done"  # by the same settings


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 4, "stages": [1]}', b'{"format": 4}', b"\xff\xfe"])
def test_a_damaged_record_is_written_anew(content: bytes, tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    store.write("run.json", content)
    run = Run.open(store, Settings(), None)
    run.record("ingest", state="done")
    run.close()
    assert json.loads(store.read("run.json"))["stages"] == {"ingest": {"state": "done"}}


@pytest.mark.parametrize(("cells", "told"), [(0.0, True), (0.25, False)])
def test_a_validation_without_cells_is_told_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cells: float, told: bool
) -> None:
    store = LocalStore(str(tmp_path))
    for split, fractions in (("train", [0.5, 0.0]), ("val", [0.0, cells])):
        columns = {field.name: pa.nulls(2, field.type) for field in TILE_SCHEMA}
        known = {"tile_id": ["a", "b"], "slide_id": ["s", "s"], "width": [8, 8], "height": [8, 8]}
        table = pa.table({**columns, **known, "mask_fraction": fractions}).cast(
            pa.schema([field.with_nullable(True) for field in TILE_SCHEMA])
        )
        path = shard_path("tiles", split, "0" * 8, 0)
        write_table(store, table, Receipt(path, 2, 2))
    read_indices(store)
    assert ("no val tile holds a cell" in capsys.readouterr().out) is told


def test_a_stage_whose_files_were_changed_is_done_again(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    ray = RaySession(run)
    run_stage(run, ray, Held(FIRST))
    run_stage(run, ray, Held(FIRST))
    assert Measure.times(run.store) == 1
    run.store.write("measured/times", b"7")
    run_stage(run, ray, Held(FIRST))
    assert Measure.times(run.store) == 8
    assert "measure: its files are not those that it committed; it is done again" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [None, "gone", "other"])
def test_weights_that_are_not_those_of_the_marker_do_not_hold(tmp_path: Path, damage: str | None) -> None:
    store = LocalStore(str(tmp_path))
    store.write("members/fcn8/model.safetensors", b"weights")
    network = TrainedNetwork("members/fcn8", hashlib.sha256(b"weights").hexdigest(), 0, 1, 0.5, "cpu")
    result = TrainingResult(Counts(1, 1), {"fcn8": network})
    if damage == "gone":
        store.delete("members/fcn8/model.safetensors")
    elif damage == "other":
        store.write("members/fcn8/model.safetensors", b"Weights")
    assert weights_hold(store, result) is (damage is None)
