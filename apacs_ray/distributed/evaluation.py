"""Evaluation by a pool of actors: the members and fusions live on the test tiles, counts back, pixels never."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pyarrow as pa

from apacs_ray.config.settings import EvaluateSettings
from apacs_ray.data.images import Rgb
from apacs_ray.data.shard_rows import Row, opened_shard, read_rows
from apacs_ray.data.shards import Place
from apacs_ray.distributed.tasks import PoolPlan, map_shards
from apacs_ray.evaluation.calibration import calibration_schema
from apacs_ray.evaluation.changes import CHANGES_SCHEMA
from apacs_ray.evaluation.judged import judged
from apacs_ray.evaluation.per_tile import PLACE, per_tile_schema
from apacs_ray.evaluation.predictions import MODEL_KEYS, predictions
from apacs_ray.inference.tile_stream import Logits, TileStream
from apacs_ray.report.overlays import change_panel, panel
from apacs_ray.storage import Store
from apacs_ray.training.dataset import decode_tile_mask

R = TypeVar("R")
ONCE = ("once_left", "once_top", "once_right", "once_bottom")


@dataclass(frozen=True)
class EvaluateTask:
    """Where the models are (key -> folder) and how they run; `member` is the one that the fusion is held against."""

    store: Store
    folders: Mapping[str, str]
    settings: EvaluateSettings
    member: str

    @property
    def models(self) -> tuple[str, ...]:
        """Keys of everything that is evaluated, in the order of the metrics."""
        plain = ("majority", "mean", "otsu")
        return tuple(key for key in MODEL_KEYS if key in self.folders or key in plain)

    @property
    def schema(self) -> pa.Schema:
        """The columns of `per_tile.parquet`."""
        networks = [field for key in self.folders for field in calibration_schema(key)]
        return pa.schema([*per_tile_schema(self.models), *networks, *CHANGES_SCHEMA])


@dataclass(frozen=True)
class DrawnTile:
    """Pictures (PNG) of a tile: the fusion against the annotation, and what it changed of the member's answer."""

    fusion: bytes
    changes: bytes


def evaluate_tiles(
    task: EvaluateTask, paths: Sequence[str], plan: PoolPlan, on_done: Callable[[int], None]
) -> pa.Table:
    """The per-tile table of all test tiles, in the order of the shards."""
    tables, done = [task.schema.empty_table()], 0  # as they come: rows as dicts would take ten times the memory
    for table in map_shards(lambda: _Evaluator(task, plan), paths, plan):
        if table.num_rows:
            tables.append(table.cast(task.schema))
            done += table.num_rows
            on_done(done)
    return pa.concat_tables(tables)


def draw_tiles(task: EvaluateTask, tiles: Sequence[Place], plan: PoolPlan) -> dict[str, DrawnTile]:
    """Return pictures of tiles by id. `plan`: of the stage."""
    wanted: dict[str, list[Place]] = defaultdict(list)
    for place in tiles:
        wanted[place.path].append(place)

    def work() -> Callable[[str], pa.Table]:
        evaluator = _Evaluator(task, plan)
        return lambda path: evaluator.draw(wanted[path])

    few = replace(plan, actors=max(1, min(plan.actors, len(wanted))))
    drawn = map_shards(work, list(wanted), few)
    rows = (row for table in drawn for row in table.to_pylist())
    return {row["id"]: DrawnTile(row["fusion"], row["changes"]) for row in rows}


class _Evaluator:
    """In an actor: the ensemble, and the rows of one shard after the other."""

    def __init__(self, task: EvaluateTask, plan: PoolPlan) -> None:
        from apacs_ray.inference.predictor import Predictor

        settings = task.settings
        self._task = task
        self._stream = TileStream(plan.threads, plan.batch)
        self._predictor = Predictor.load(
            task.store, task.folders, threads=settings.threads, precision=settings.precision
        )

    def __call__(self, path: str) -> pa.Table:
        border, member = self._task.settings.border, self._task.member

        def finish(tile: Row, rgb: Rgb, logits: Logits) -> dict[str, Any]:
            truth = decode_tile_mask(tile["mask"]).view(bool)
            return judged(rgb, logits, tile, truth, border=border, member=member)

        with opened_shard(self._task.store, path) as shard:
            rows = shard.rows([*PLACE, *ONCE, "image", "mask"])
            return pa.Table.from_pylist(list(self._run(rows, finish)), self._task.schema)

    def draw(self, tiles: Sequence[Place]) -> pa.Table:
        """Draw tiles of a shard."""

        def finish(tile: Row, rgb: Rgb, logits: Logits) -> dict[str, Any]:
            masks, truth = predictions(logits, rgb), decode_tile_mask(tile["mask"]).view(bool)
            fusion, member = masks["fusion"], masks[self._task.member]
            changed = change_panel(rgb, truth, fusion, member)
            return {"id": tile["tile_id"], "fusion": panel(rgb, truth, fusion), "changes": changed}

        places = [(tile.path, tile.group, tile.row) for tile in tiles]
        rows = read_rows(self._task.store, places, ["tile_id", "image", "mask"])
        return pa.Table.from_pylist(list(self._run(rows, finish)))

    def _run(self, rows: Iterable[Row], finish: Callable[[Row, Rgb, Logits], R]) -> Iterator[R]:
        """What `finish` makes of every annotated tile."""
        annotated = (row for row in rows if row["mask"] is not None)
        return self._stream.run(annotated, lambda _: self._predictor, finish)
