"""The frozen members over training and val tiles: one heatmap shard beside each tile shard, by a pool of actors.

A row holds one lossless RGB PNG, whose channels are the probabilities of FCN-32, FCN-16 and FCN-8 as uint8 (0..255).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from apacs_ray.data.shard_rows import Row, opened_shard
from apacs_ray.data.shards import Receipt, TileIndex, open_table, read_receipt, write_table
from apacs_ray.distributed.tasks import PoolPlan, map_shards
from apacs_ray.evaluation.predictions import sigmoid
from apacs_ray.inference.tile_stream import Logits, TileStream
from apacs_ray.storage import Store
from apacs_ray.training.dataset import Heatmaps, encode_heatmaps

if TYPE_CHECKING:
    from apacs_ray.inference.predictor import Predictor

HEATMAP_SCHEMA = pa.schema([("tile_id", pa.string()), ("heatmaps", pa.binary())])
ALL = 0  # the fold of tiles that no fold left out: seen by the members trained on everything
_PATH = pa.dictionary(pa.int32(), pa.string())
FOLD_SCHEMA = pa.schema([("path", _PATH), ("tile_id", pa.string()), ("fold", pa.int8())])  # of train tiles


@dataclass(frozen=True)
class HeatmapTask:
    """What every heatmap shard has in common.

    `members[fold]` are the model folders that see the tiles of that fold, as the file `folds` says: a table of
    `FOLD_SCHEMA`, which actors read from the store. None: all are of the fold `ALL`.
    """

    store: Store
    heatmaps: Heatmaps
    members: Mapping[int, Mapping[str, str]]
    folds: str | None
    threads: int
    precision: str
    views: int


def write_heatmaps(
    task: HeatmapTask, paths: Sequence[str], plan: PoolPlan, on_done: Callable[[int], None]
) -> tuple[int, int]:
    """Write the heatmap shard of every tile shard; returns rows in and rows out."""
    rows_in = rows_out = 0
    for table in map_shards(lambda: _HeatmapWriter(task, plan), paths, plan):
        for row in table.to_pylist():
            rows_in += row["rows_in"]
            rows_out += row["rows_out"]
        on_done(rows_in)
    return rows_in, rows_out


def write_folds(store: Store, path: str, index: TileIndex, fold_of: Mapping[str, int]) -> None:
    """Write the fold of each tile of an index, by shards, as actors look them up."""
    shards = pa.DictionaryArray.from_arrays(pa.array(index.shard), pa.array(index.paths, pa.string()))
    folds = pa.array([fold_of[tile] for tile in index.tile_ids], pa.int8())
    sink = io.BytesIO()
    pq.write_table(pa.table([shards, pa.array(index.tile_ids), folds], FOLD_SCHEMA), sink)
    store.write(path, sink.getvalue())


def read_folds(store: Store, path: str) -> pa.Table:
    """Return the table of `FOLD_SCHEMA` that `write_folds` wrote."""
    return open_table(pa.BufferReader(store.read(path)), path).read()


class _HeatmapWriter:
    """In an actor: the networks of every fold, loaded once, when they are first needed."""

    def __init__(self, task: HeatmapTask, plan: PoolPlan) -> None:
        self._task = task
        self._stream = TileStream(plan.threads, plan.batch, task.views)
        self._folds = FOLD_SCHEMA.empty_table() if task.folds is None else read_folds(task.store, task.folds)
        self._predictors: dict[int, Predictor] = {}

    def __call__(self, path: str) -> pa.Table:
        target = self._task.heatmaps.path(path)
        receipt = read_receipt(self._task.store, target) or self._write(path, target)
        return pa.table({"rows_in": [receipt.rows_in], "rows_out": [receipt.rows_out]})

    def _predictor(self, fold: int) -> Predictor:
        if fold not in self._predictors:
            from apacs_ray.inference.predictor import Predictor

            task = self._task
            self._predictors[fold] = Predictor.load(
                task.store, task.members[fold], threads=task.threads, precision=task.precision
            )
        return self._predictors[fold]

    def _write(self, path: str, target: str) -> Receipt:
        tiles = self._folds.filter(pc.field("path") == path)
        fold_of = dict(zip(tiles["tile_id"].to_pylist(), tiles["fold"].to_pylist(), strict=True))

        def seen_by(tile: Row) -> Predictor:
            return self._predictor(fold_of.get(tile["tile_id"], ALL))

        def finish(tile: Row, _: object, logits: Logits) -> dict[str, Any]:
            probabilities = {name: sigmoid(output) for name, output in logits.items()}
            return {"tile_id": tile["tile_id"], "heatmaps": encode_heatmaps(probabilities)}

        with opened_shard(self._task.store, path) as shard:
            group = shard.group
            rows = list(self._stream.run(shard.rows(["tile_id", "image"]), seen_by, finish))
        receipt = Receipt(target, len(rows), len(rows))
        write_table(self._task.store, pa.Table.from_pylist(rows, HEATMAP_SCHEMA), receipt, group)
        return receipt
