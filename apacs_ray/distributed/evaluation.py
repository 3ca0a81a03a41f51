"""Evaluation by a pool of actors: the members and fusions live on the test tiles, counts back, pixels never."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from apacs_ray.config.settings import EvaluateSettings
from apacs_ray.data.shards import open_table
from apacs_ray.distributed.tasks import PoolPlan, map_shards
from apacs_ray.evaluation.calibration import calibration_schema
from apacs_ray.evaluation.changes import CHANGES_SCHEMA
from apacs_ray.evaluation.judged import judged
from apacs_ray.evaluation.per_tile import PLACE, per_tile_schema
from apacs_ray.evaluation.predictions import MODEL_KEYS, predictions
from apacs_ray.report.overlays import change_panel, panel
from apacs_ray.storage import Store
from apacs_ray.training.dataset import decode_pixels

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
    for table in map_shards(lambda: _Evaluator(task), paths, plan):
        if table.num_rows:
            tables.append(table.cast(task.schema))
            done += table.num_rows
            on_done(done)
    return pa.concat_tables(tables)


def draw_tiles(task: EvaluateTask, wanted: Mapping[str, Sequence[str]], plan: PoolPlan) -> dict[str, DrawnTile]:
    """Return pictures of tiles by id. `wanted`: shard path -> tile ids; `plan`: of the stage."""

    def work() -> Callable[[str], pa.Table]:
        evaluator = _Evaluator(task)

        def draw(path: str) -> pa.Table:
            pictures = []
            for tile, rgb, truth in evaluator.tiles(path):
                if tile["tile_id"] in wanted[path]:
                    masks = evaluator.predict(rgb)
                    fusion, member = masks["fusion"], masks[task.member]
                    changed = change_panel(rgb, truth, fusion, member)
                    pictures.append({"id": tile["tile_id"], "fusion": panel(rgb, truth, fusion), "changes": changed})
            return pa.Table.from_pylist(pictures)

        return draw

    few = replace(plan, actors=max(1, min(plan.actors, len(wanted))))
    drawn = map_shards(work, list(wanted), few)
    rows = (row for table in drawn for row in table.to_pylist())
    return {row["id"]: DrawnTile(row["fusion"], row["changes"]) for row in rows}


class _Evaluator:
    """In an actor: the ensemble, and the rows of one shard after the other."""

    def __init__(self, task: EvaluateTask) -> None:
        from apacs_ray.inference.predictor import Predictor

        settings = task.settings
        self._task = task
        self._predictor = Predictor.load(
            task.store, task.folders, threads=settings.threads, precision=settings.precision
        )

    def __call__(self, path: str) -> pa.Table:
        rows = []
        for tile, rgb, truth in self.tiles(path):
            logits = self._predictor.logits(rgb)
            border, member = self._task.settings.border, self._task.member
            rows.append(judged(rgb, logits, tile, truth, border=border, member=member))
        return pa.Table.from_pylist(rows, self._task.schema)

    def tiles(self, path: str) -> Any:
        """(row, RGB, mask) of every annotated tile of a shard, one at a time."""
        columns = [*PLACE, *ONCE, "image", "mask"]
        with self._task.store.open(path) as stream:
            file = open_table(stream, path, pre_buffer=True)
            for group in range(file.num_row_groups):
                for tile in file.read_row_group(group, columns=columns).to_pylist():
                    if tile["mask"] is not None:
                        yield tile, decode_pixels(tile["image"]), decode_pixels(tile["mask"])

    def predict(self, rgb: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.bool_]]:
        """What every model says of a tile."""
        return predictions(self._predictor.logits(rgb), rgb)
