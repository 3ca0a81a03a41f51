"""A stage that is struck at any of its writes and done again leaves what it would have left, and never says more.

`benchmarks/every_write.py` does it at all writes of all stages in all ways, and in whole runs on Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apacs_ray.storage import LocalStore
from apacs_ray.testing.alone import alone
from apacs_ray.testing.every_write import NAMES, OTHER, SETTINGS, Site, Story
from apacs_ray.testing.faulty_store import KINDS
from apacs_ray.testing.runs import write_cells
from apacs_ray.testing.wholeness import contents, differences, lies


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("every_write")
    with alone():
        yield Site(folder, str(write_cells(folder / "cells", train=4, test=2)), SETTINGS, OTHER)


@pytest.mark.xdist_group("every_write")  # one site for all of them
@pytest.mark.parametrize(
    ("stage", "story", "every"),  # this one of its writes is struck
    [
        ("ingest", "fresh", 1),
        ("ingest", "after other", 1),
        ("ingest", "other between", 1),
        ("train_members", "fresh", 5),
        ("heatmaps", "fresh", 1),
        ("tune_fusion", "fresh", 1),
        ("train_fusion", "fresh", 4),
        ("evaluate", "fresh", 8),
        ("evaluate", "after other", 30),
    ],
)
def test_a_stage_struck_at_a_write_is_whole_when_it_is_done_again(
    site: Site, stage: str, story: Story, every: int
) -> None:
    struck = list(range(every // 2, site.count(stage, story), every))
    points = [site.strike(stage, story, at, KINDS[number % len(KINDS)]) for number, at in enumerate(struck)]
    assert points
    assert [point for point in points if point.defects or point.again or not point.raised] == []


@pytest.mark.xdist_group("every_write")
@pytest.mark.parametrize(
    "path",
    [
        *("tiles/split=*/*.parquet", "rejects/*.parquet", "members/fcn8/model.safetensors", "members/fcn8/model.json"),
        *("members/fcn8/history.csv", "heatmaps/split=*/*.parquet", "tune/best.yaml", "tune/trials.csv"),
        *("fusion/model.safetensors", "evaluation/metrics.json", "evaluation/per_tile.parquet"),
        *("evaluation/report.html", "tiles/_committed.json", "fusion/_committed.json"),
    ],
)
def test_a_record_of_what_is_not_there_is_a_lie(site: Site, path: str, tmp_path: Path) -> None:
    whole = site.undisturbed(NAMES[-1])
    assert lies(whole) == []
    store = LocalStore(str(tmp_path))
    for file in whole.rglob("*"):
        if file.is_file():
            store.write(file.relative_to(whole).as_posix(), file.read_bytes())
    assert differences(tmp_path, whole) == []
    gone = sorted(tmp_path.glob(path))[0]
    gone.unlink()
    assert lies(tmp_path)
    assert differences(tmp_path, whole) == [gone.relative_to(tmp_path).as_posix()]


def test_times_and_owners_are_no_difference(tmp_path: Path) -> None:
    marker: dict[str, Any] = {"fingerprint": "1", "started": 1.0, "seconds": 2.0, "lease": "a", "result": {"n": 1}}
    for name, changes in (("a", {}), ("b", {"started": 2.0, "lease": "b"}), ("c", {"result": {"n": 2}})):
        text = str({**marker, **changes}).replace("'", '"')
        LocalStore(str(tmp_path / name)).write("tiles/_committed.json", text.encode())
    assert contents(tmp_path / "a") == contents(tmp_path / "b") != contents(tmp_path / "c")
