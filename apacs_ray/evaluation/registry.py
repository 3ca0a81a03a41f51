"""The list of metrics beside accuracy, IoU and Dice: what each counts in a tile, and what its sums come to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from apacs_ray.evaluation.objects import boundary, label_objects, match_objects
from apacs_ray.evaluation.predictions import Mask

BOUNDARY_SHARE = 0.02  # of the tile's diagonal: width of the boundary band, as in Cheng et al. (CVPR 2021)
Region = tuple[slice, slice]  # rows and columns of a tile whose pixels only this tile counts
Counter = Callable[[Mask], dict[str, int]]  # a model's mask (H, W) -> its counts


@dataclass(frozen=True)
class Metric:
    """A metric made of integer counts, so that tiles add up in any order.

    Attributes:
        counts: Names of its counts; `per_tile.parquet` has a column `<model>_<count>` for each.
        counter: From a tile's annotation (H, W) and the region that counts to what counts a model's mask of the whole
            tile. What depends on the annotation alone is done once for all models.
        pool: From the sums over all tiles, by name, to entries of `metrics.json`; None where a ratio is 0/0.
    """

    counts: tuple[str, ...]
    counter: Callable[[Mask, Region], Counter]
    pool: Callable[[Mapping[str, int]], dict[str, Any]]


def _boundary_counter(truth: Mask, region: Region) -> Counter:
    """Boundaries are drawn in the whole tile, so that a cut through a cell is no outline."""
    band = max(1, round(BOUNDARY_SHARE * float(np.hypot(*truth.shape))))
    true_band = boundary(truth, band)[region]

    def count(mask: Mask) -> dict[str, int]:
        edge = boundary(mask, band)[region]
        return {
            "boundary_intersection": int(np.count_nonzero(edge & true_band)),
            "boundary_union": int(np.count_nonzero(edge | true_band)),
        }

    return count


def _pool_boundary(sums: Mapping[str, int]) -> dict[str, Any]:
    shared, union = sums["boundary_intersection"], sums["boundary_union"]
    return {"boundary_iou": shared / union if union else None}


def _object_counter(truth: Mask, region: Region) -> Counter:
    true_objects = label_objects(truth[region])
    return lambda mask: match_objects(label_objects(mask[region]), true_objects)


def _pool_objects(sums: Mapping[str, int]) -> dict[str, Any]:
    tp, fp, fn = sums["objects_tp"], sums["objects_fp"], sums["objects_fn"]
    return {
        "objects": {"tp": tp, "fp": fp, "fn": fn},
        "object_f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None,
    }


METRICS = [
    Metric(("boundary_intersection", "boundary_union"), _boundary_counter, _pool_boundary),
    Metric(("objects_tp", "objects_fp", "objects_fn"), _object_counter, _pool_objects),
]
