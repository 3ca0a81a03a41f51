"""One tile, all models: integer counts only, so that results add up in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import ndimage

from apacs_ray.evaluation.predictions import Mask

BOUNDARY_SHARE = 0.02  # of the tile's diagonal: width of the boundary band, as in Cheng et al. (CVPR 2021)
MATCH_IOU = 0.5  # from which a predicted object is the annotated one
SMALLEST_OBJECT = 16  # px; smaller components are specks, neither found nor missed
EIGHT = np.ones((3, 3), bool)
COUNTS = ("tp", "fp", "tn", "fn", "boundary_intersection", "boundary_union", "objects_tp", "objects_fp", "objects_fn")
PLACE = ("tile_id", "slide_id", "x", "y", "width", "height")


def per_tile_schema(models: Sequence[str]) -> pa.Schema:
    """Columns of `per_tile.parquet`: the tile, `<model>_<count>` for every model, and `disagreement`."""
    kinds = {"tile_id": pa.string(), "slide_id": pa.string()}
    columns = [(name, kinds.get(name, pa.int64())) for name in PLACE]
    columns += [(f"{model}_{count}", pa.int64()) for model in models for count in COUNTS]
    return pa.schema([*columns, ("disagreement", pa.float64())])


def tile_row(
    tile: Mapping[str, Any], masks: Mapping[str, Mask], truth: Mask, *, border: int, disputed: Sequence[str]
) -> dict[str, Any]:
    """The row of one tile.

    `masks` and `truth` are (H, W). Pixels are counted in the part that only this tile counts, less `border` px at the
    tile's edge. `disagreement` is the share of those pixels that all `disputed` models call differently from the
    annotation: candidates for another look, as in the paper's technical validation.
    """
    left, top, right, bottom = (int(tile[f"once_{side}"]) for side in ("left", "top", "right", "bottom"))
    height, width = truth.shape
    region = np.s_[max(top, border) : min(bottom, height - border), max(left, border) : min(right, width - border)]
    row: dict[str, Any] = {name: tile[name] for name in PLACE}
    band = max(1, round(BOUNDARY_SHARE * float(np.hypot(height, width))))
    true_band = _boundary(truth, band)[region]
    true_objects = _objects(truth[region])
    for model, mask in masks.items():
        counted = confusion(mask[region], truth[region])
        edge = _boundary(mask, band)[region]
        counted["boundary_intersection"] = int((edge & true_band).sum())
        counted["boundary_union"] = int((edge | true_band).sum())
        counted |= match_objects(_objects(mask[region]), true_objects)
        row |= {f"{model}_{name}": value for name, value in counted.items()}
    wrong = np.logical_and.reduce([masks[model][region] != truth[region] for model in disputed])
    row["disagreement"] = float(wrong.mean()) if wrong.size else 0.0
    return row


def confusion(mask: Mask, truth: Mask) -> dict[str, int]:
    """Pixels by kind."""
    overlap, predicted, true = int((mask & truth).sum()), int(mask.sum()), int(truth.sum())
    return {"tp": overlap, "fp": predicted - overlap, "tn": truth.size - predicted - true + overlap, "fn": true - overlap}


def match_objects(found: npt.NDArray[np.int32], true: npt.NDArray[np.int32]) -> dict[str, int]:
    """Objects matched one to one at IoU >= 0.5 (above one half, at most one partner is possible).

    `found` and `true` are label images (H, W) with 0 for background.
    """
    found_areas, true_areas = np.bincount(found.ravel()), np.bincount(true.ravel())
    pairs, overlaps = np.unique(np.stack([found.ravel(), true.ravel()]), axis=1, return_counts=True)
    taken_found: set[int] = set()
    taken_true: set[int] = set()
    for (one, other), overlap in zip(pairs.T.tolist(), overlaps.tolist(), strict=True):
        if one and other and one not in taken_found and other not in taken_true:
            union = found_areas[one] + true_areas[other] - overlap
            if overlap >= MATCH_IOU * union:
                taken_found.add(one)
                taken_true.add(other)
    n_found, n_true = int((found_areas[1:] > 0).sum()), int((true_areas[1:] > 0).sum())
    matched = len(taken_true)
    return {"objects_tp": matched, "objects_fp": n_found - matched, "objects_fn": n_true - matched}


def _objects(mask: Mask) -> npt.NDArray[np.int32]:
    """Label image of the 8-connected components of at least `SMALLEST_OBJECT` px."""
    labels, _ = ndimage.label(mask, EIGHT)
    labels = np.asarray(labels, np.int32)
    small = np.bincount(labels.ravel()) < SMALLEST_OBJECT
    small[0] = False
    labels[small[labels]] = 0
    return labels


def _boundary(mask: Mask, band: int) -> Mask:
    """Pixels of the mask within `band` px of its outline; the tile's edge is no outline."""
    distance = ndimage.distance_transform_cdt(np.pad(mask, 1, mode="edge"), "chessboard")[1:-1, 1:-1]
    return np.asarray(mask & (distance <= band) & (distance > 0))
