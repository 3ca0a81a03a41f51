"""The index of a split: one file, found by the hash that the commit names, and the same as what the shards say."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apacs_ray.config.settings import Settings
from apacs_ray.data import shards
from apacs_ray.data.index_file import INDEX, index_path
from apacs_ray.data.shard_rows import opened_shard, read_rows
from apacs_ray.data.shards import TileIndex, read_finished, read_index, shard_paths
from apacs_ray.data.tile_rows import TILE_SCHEMA
from apacs_ray.runs.markers import read_marker
from apacs_ray.runs.run import Run
from apacs_ray.stages.ingest_result import read_committed_index
from apacs_ray.stages.pipeline import run_pipeline
from apacs_ray.stages.train_networks import read_indices
from apacs_ray.storage import LocalStore, Store, open_store
from apacs_ray.testing.alone import AloneSession, alone
from apacs_ray.testing.runs import write_cells
from apacs_ray.testing.s3_proxy import Behavior, Proxy

SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Row groups of few tiles, as those of large tiles are."""
    monkeypatch.setattr(shards, "ROW_GROUP", 2)
    with alone():
        yield


def ingested(store: Store, folder: Path, **tiles: Any) -> Store:
    """A run whose tiles are cut, in shards of 8 unless `tiles` says otherwise."""
    data = folder / "cells"
    if not data.exists():
        write_cells(data, train=6, test=2)
    settings = Settings.model_validate({"tiles": {"size": 32, "shard": 8, **tiles}})
    run = Run.open(store, settings, str(data))
    try:
        run_pipeline(run, AloneSession(run), ["ingest"])
    finally:
        run.close()
    return store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return ingested(LocalStore(str(tmp_path / "run")), tmp_path)


def plain(index: TileIndex) -> dict[str, Any]:
    values = {field.name: getattr(index, field.name) for field in dataclasses.fields(index)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def without_footers(store: Store, split: str) -> None:
    """Write the shards of a split as they were before footers held the index."""
    for path in shard_paths(store, "tiles", split):
        receipt = shards.read_receipt(store, path)
        assert receipt is not None
        with store.open(path) as stream:
            table = pq.ParquetFile(stream).read()
        shards.write_table(store, table, dataclasses.replace(receipt, index=""))


def test_an_index_takes_two_requests_however_many_shards_there_are(s3: str, between: Proxy, tmp_path: Path) -> None:
    store = ingested(open_store(f"{s3}/run"), tmp_path)
    assert min(len(shard_paths(store, "tiles", split)) for split in ("train", "test")) > 1
    between.behavior = Behavior(draw=lambda: "delay", delay=0.03)
    for split in SPLITS:
        between.requests.clear()
        assert len(read_indices(store, (split,))[split])
        methods = Counter(request.method for request in between.requests)
        assert methods == {"GET": 2}, f"{split}: {methods} of {[request.key for request in between.requests]}"


def test_the_file_the_footers_and_the_columns_say_the_same(store: Store) -> None:
    for split in SPLITS:
        from_file = plain(read_committed_index(store, split))
        assert len(from_file["tile_ids"]) > 8
        assert len(set(from_file["shard"])) > 1
        assert max(from_file["group"]) > 1
        assert plain(read_index(store, split)) == from_file
        without_footers(store, split)
        assert plain(read_index(store, split)) == from_file
        for path, group, row, tile in zip(
            *(
                [from_file["paths"][shard] for shard in from_file["shard"]],
                *(from_file[name] for name in ("group", "row", "tile_ids")),
            ),
            strict=True,
        ):
            assert list(read_rows(store, [(path, group, row)], ["tile_id"])) == [{"tile_id": tile}]


@pytest.mark.parametrize("damage", ["cut", "of another ingest", "gone"])
def test_an_index_that_was_not_committed_is_not_taken(
    store: Store, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = plain(read_committed_index(store, "train"))
    marker = read_marker(store, "tiles")
    assert marker is not None
    path = index_path("train", marker.fingerprint)
    if damage == "cut":
        store.write(path, store.read(path)[:-9])
    elif damage == "gone":
        store.delete(path)
    else:
        other = ingested(LocalStore(str(tmp_path / "other")), tmp_path, size=40)
        (theirs,) = [entry.path for entry in other.list("tiles/_index") if "train" in entry.path]
        store.write(path, other.read(theirs))
    assert "not what was committed" not in caplog.text
    assert plain(read_committed_index(store, "train")) == expected
    assert caplog.text.count("not what was committed") == 1


def test_a_run_without_index_files_is_read_from_its_shards(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    expected = plain(read_committed_index(store, "val"))
    store.delete_folder("tiles/_index")
    marker = json.loads(store.read("tiles/_committed.json"))
    del marker["result"]["index"]
    store.write("tiles/_committed.json", json.dumps(marker).encode())
    without_footers(store, "val")
    assert plain(read_committed_index(store, "val")) == expected
    assert not caplog.text


def test_a_finished_shard_gives_its_part_of_the_index_with_or_without_it_in_the_footer(store: Store) -> None:
    path = shard_paths(store, "tiles", "train")[0]
    finished = read_finished(store, path)
    assert finished is not None
    assert json.loads(finished.index)["tile_id"]
    without_footers(store, "train")
    with store.open(path) as stream:
        assert INDEX not in pq.read_metadata(stream).metadata
    assert read_finished(store, path) == finished


def test_files_of_an_earlier_index_go_and_others_stay(store: Store, tmp_path: Path) -> None:
    before = {entry.path for entry in store.list("tiles/_index")}
    store.write("tiles/_index/note.txt", b"a person's")
    ingested(store, tmp_path, size=40)
    after = {entry.path for entry in store.list("tiles/_index")}
    assert len(before) == 3
    assert len(after) == 4
    assert after & before == set()
    assert "tiles/_index/note.txt" in after


def test_readers_of_parquet_folders_leave_the_index_out(store: Store) -> None:
    rows = pq.read_table(store.full_path("tiles"), columns=["tile_id"]).num_rows
    marker = read_marker(store, "tiles")
    assert marker is not None
    assert rows == sum(marker.result["tiles"].values())


def test_a_tile_of_a_shard_of_large_tiles_takes_two_requests(s3: str, between: Proxy) -> None:
    """One for the footer, whatever its size, and one for the row group; training does this for every tile."""
    store, rows = open_store(f"{s3}/run"), 128
    values = {"string": "s" * 20, "binary": b"b" * 4000, "double": 0.5}
    columns = {field.name: [values.get(str(field.type), 1)] * rows for field in TILE_SCHEMA}
    columns["tile_id"] = [f"{number}" for number in range(rows)]
    path = shards.shard_path("tiles", "train", "f" * 16, 0)
    shards.write_tiles(store, pa.table(columns, TILE_SCHEMA), shards.Receipt(path, rows, rows))
    between.requests.clear()
    assert next(read_rows(store, [(path, 5, 1)], ["tile_id", "image"]))["tile_id"] == "11"
    assert [request.method for request in between.requests] == ["GET", "GET"]
    between.requests.clear()
    with opened_shard(store, path) as shard:
        assert shard.file.num_row_groups > 8
        assert [row["tile_id"] for row in shard.rows(["tile_id", "image"])] == columns["tile_id"]
    assert [request.method for request in between.requests] == ["GET", "GET"], "one for all row groups"
