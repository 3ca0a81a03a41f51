"""What the driver holds, and what it sends to every actor, does not grow with Python objects for each tile."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from apacs_ray.config.settings import EvaluateSettings, Settings
from apacs_ray.data.shards import shard_paths
from apacs_ray.distributed import evaluation, heatmaps
from apacs_ray.distributed.evaluation import EvaluateTask, evaluate_tiles
from apacs_ray.distributed.heatmaps import ALL, HeatmapTask, write_folds, write_heatmaps
from apacs_ray.distributed.tasks import PoolPlan
from apacs_ray.evaluation.judged import judged
from apacs_ray.inference.predictor import Predictor
from apacs_ray.models.registry import MEMBERS
from apacs_ray.runs.run import Run
from apacs_ray.stages.heatmaps import assign_folds
from apacs_ray.stages.ingest_result import read_committed_index
from apacs_ray.stages.pipeline import run_pipeline
from apacs_ray.storage import LocalStore
from apacs_ray.synthetic.slide import render_region, slide_specs
from apacs_ray.testing.alone import AloneSession, alone
from apacs_ray.testing.ensembles import random_networks, write_networks
from apacs_ray.testing.runs import write_cells
from apacs_ray.training.dataset import Heatmaps, decode_pixels

POOL = PoolPlan(1, 1.0, 0.0, threads=2)


def test_counts_of_tiles_stay_in_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = EvaluateTask(LocalStore(str(tmp_path)), dict.fromkeys((*MEMBERS, "fusion"), ""), EvaluateSettings(), "fcn8")
    schema, rows, shards = task.schema, 64, 50

    def shard(number: int) -> pa.Table:
        values = {
            pa.string(): [f"{number}-{row}" for row in range(rows)],
            pa.int64(): [number + row for row in range(rows)],
            pa.float64(): [0.5] * rows,
        }
        columns = [values.get(field.type, [[number]] * rows) for field in schema]
        return pa.table(dict(zip(schema.names, columns, strict=True)), schema)

    def counted(*_: Any) -> Iterator[pa.Table]:
        for number in range(shards):
            yield shard(number)
            yield schema.empty_table()  # of a shard without an annotated tile

    monkeypatch.setattr(evaluation, "map_shards", counted)
    done: list[int] = []
    shard(0)  # imports what it needs
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    table = evaluate_tiles(task, [], POOL, done.append)
    held = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert table.schema == schema
    assert table["tile_id"].to_pylist() == [f"{number}-{row}" for number in range(shards) for row in range(rows)]
    assert table["fusion_tp"][-1].as_py() == rows - 1 + shards - 1
    assert done == [rows * (number + 1) for number in range(shards)]
    assert held / table.num_rows < 500, "bytes of Python objects a tile; a row as a dict has some 2000"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[LocalStore]:
    """A run whose tiles are cut, with three ensembles of other weights."""
    with alone():
        store = LocalStore(str(tmp_path / "run"))
        settings = Settings.model_validate({"tiles": {"size": 40, "shard": 6}})
        opened = Run.open(store, settings, str(write_cells(tmp_path / "cells", train=6, test=2)))
        try:
            run_pipeline(opened, AloneSession(opened), ["ingest"])
        finally:
            opened.close()
        picture, _ = render_region(slide_specs(1, 300, 300, train=1, test=1)[0], 20, 20, 64, 64)
        for fold in range(3):
            write_networks(store.child(f"models/{fold}"), random_networks(picture, width=0.02, seed=fold))
        yield store


def test_each_tile_is_seen_by_the_members_of_its_fold(run: LocalStore) -> None:
    index = read_committed_index(run, "train")
    fold_of = assign_folds(index, 2, 0)
    assert set(fold_of.values()) == {1, 2}
    write_folds(run, "heatmaps/folds/x.parquet", index, fold_of)
    members = {fold: {name: f"models/{fold}/members/{name}" for name in MEMBERS} for fold in range(3)}
    task = HeatmapTask(run, Heatmaps(MEMBERS, "f" * 16), members, "heatmaps/folds/x.parquet", 1, "float32", 1)
    paths = [path for split in ("train", "val") for path in shard_paths(run, "tiles", split)]
    write_heatmaps(task, paths, POOL, lambda done: None)
    predictors = {
        fold: Predictor.load(run, folders, threads=1, precision="float32") for fold, folders in members.items()
    }
    folds = set()
    for path in paths:
        tiles = pq.read_table(run.full_path(path), columns=["tile_id", "image"]).to_pylist()
        stored = pq.read_table(run.full_path(task.heatmaps.path(path))).to_pylist()
        for tile, heatmap in zip(tiles, stored, strict=True):
            fold = fold_of.get(tile["tile_id"], ALL) if "split=train" in path else ALL
            folds.add(fold)
            probabilities = predictors[fold].probabilities(decode_pixels(tile["image"]), 1)
            assert heatmap["heatmaps"] == heatmaps.encode_heatmaps(probabilities)
    assert folds == {0, 1, 2}
    assert not [tile for tile in index.tile_ids if tile.encode() in pickle.dumps(task)], "every actor is sent these"


def test_evaluation_judges_each_tile_as_it_would_alone(run: LocalStore) -> None:
    """Threads beside the networks change no number and no order; the pictures of the report are of the tiles asked."""
    folders = {name: f"models/0/members/{name}" for name in MEMBERS} | {"fusion": "models/0/fusion"}
    task = EvaluateTask(run, folders, EvaluateSettings(threads=1, border=2), "fcn8")
    index = read_committed_index(run, "test")
    table = evaluate_tiles(task, list(index.paths), POOL, lambda done: None)
    predictor = Predictor.load(run, folders, threads=1, precision="float32")
    expected = []
    for path in index.paths:
        for tile in pq.read_table(run.full_path(path)).to_pylist():
            rgb, truth = decode_pixels(tile["image"]), decode_pixels(tile["mask"]).astype(bool)
            expected.append(judged(rgb, predictor.logits(rgb), tile, truth, border=2, member="fcn8"))
    assert len(expected) > POOL.threads + 2
    assert table.equals(pa.Table.from_pylist(expected, task.schema))
    wanted = [index.place(row) for row in (len(index) - 1, 1)]
    drawn = evaluation.draw_tiles(task, wanted, POOL)
    assert set(drawn) == {place.tile_id for place in wanted}
