"""Evaluation by a pool of actors: the members and fusions live on the test tiles, counts back, pixels never."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from apacs_ray.config.settings import EvaluateSettings
from apacs_ray.data.shards import open_table
from apacs_ray.distributed.tasks import PoolPlan, map_shards
from apacs_ray.evaluation.per_tile import PLACE, per_tile_schema, tile_row
from apacs_ray.evaluation.predictions import MODEL_KEYS, predictions
from apacs_ray.models.registry import MEMBERS
from apacs_ray.report.overlays import panel
from apacs_ray.storage import Store
from apacs_ray.training.dataset import decode_pixels

ONCE = ("once_left", "once_top", "once_right", "once_bottom")


@dataclass(frozen=True)
class EvaluateTask:
    """Where the models are (key -> folder) and how they run."""

    store: Store
    folders: Mapping[str, str]
    settings: EvaluateSettings

    @property
    def models(self) -> tuple[str, ...]:
        """Keys of everything that is evaluated, in the order of the metrics."""
        plain = ("majority", "mean", "otsu")
        return tuple(key for key in MODEL_KEYS if key in self.folders or key in plain)


def evaluate_tiles(
    task: EvaluateTask, paths: Sequence[str], plan: PoolPlan, on_done: Callable[[int], None]
) -> pa.Table:
    """The per-tile table of all test tiles, in the order of the shards."""
    schema = per_tile_schema(task.models)
    tables, done = [schema.empty_table()], 0  # as they come: rows as dicts would take ten times the memory
    for table in map_shards(lambda: _Evaluator(task), paths, plan):
        if table.num_rows:
            tables.append(table.cast(schema))
            done += table.num_rows
            on_done(done)
    return pa.concat_tables(tables)


def draw_tiles(task: EvaluateTask, wanted: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
    """Pictures (PNG) of tiles by id: image and overlay of the fusion. `wanted`: shard path -> tile ids."""

    def work() -> Callable[[str], pa.Table]:
        evaluator = _Evaluator(task)

        def draw(path: str) -> pa.Table:
            pictures = []
            for tile, rgb, truth in evaluator.tiles(path):
                if tile["tile_id"] in wanted[path]:
                    mask = evaluator.masks(rgb)["fusion"]
                    pictures.append({"tile_id": tile["tile_id"], "picture": panel(rgb, truth, mask)})
            return pa.Table.from_pylist(pictures)

        return draw

    plan = PoolPlan(actors=1, cpus=1.0, gpus=0.0)
    drawn = map_shards(work, list(wanted), plan)
    return {row["tile_id"]: row["picture"] for table in drawn for row in table.to_pylist()}


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
            border = self._task.settings.border
            rows.append(tile_row(tile, self.masks(rgb), truth, border=border, disputed=MEMBERS))
        return pa.Table.from_pylist(rows, per_tile_schema(self._task.models))

    def tiles(self, path: str) -> Any:
        """(row, RGB, mask) of every annotated tile of a shard, one at a time."""
        columns = [*PLACE, *ONCE, "image", "mask"]
        with self._task.store.open(path) as stream:
            for batch in open_table(stream, path).iter_batches(1, columns=columns):
                (tile,) = batch.to_pylist()
                if tile["mask"] is not None:
                    yield tile, decode_pixels(tile["image"]), decode_pixels(tile["mask"])

    def masks(self, rgb: npt.NDArray[np.uint8]) -> dict[str, npt.NDArray[np.bool_]]:
        """What every model says of a tile."""
        return predictions(self._predictor.logits(rgb), rgb)
