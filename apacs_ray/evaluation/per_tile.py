"""Counts of one tile for all models: integers only, so that results add up in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from apacs_ray.evaluation.predictions import Mask
from apacs_ray.evaluation.registry import METRICS

PIXELS = ("tp", "fp", "tn", "fn")
PLACE = ("tile_id", "slide_id", "x", "y", "width", "height")


def per_tile_schema(models: Sequence[str]) -> pa.Schema:
    """Return the columns of `per_tile.parquet`: the tile, `<model>_<count>` for every model, and `disagreement`.

    Args:
        models: Their names, in the order of the columns.

    Returns:
        The schema. Counts are int64: `tp fp tn fn` in pixels; `boundary_intersection` and `boundary_union` in pixels
        of the two boundary bands; `objects_tp objects_fp objects_fn` in objects matched, predicted only, annotated
        only. `disagreement` is float64, 0..1.
    """
    counts = [*PIXELS, *(count for metric in METRICS for count in metric.counts)]
    columns: list[tuple[str, Any]] = []
    columns += [(name, pa.string() if name.endswith("_id") else pa.int64()) for name in PLACE]
    columns += [(f"{model}_{count}", pa.int64()) for model in models for count in counts]
    return pa.schema([*columns, ("disagreement", pa.float64())])


def tile_row(
    tile: Mapping[str, Any], masks: Mapping[str, Mask], truth: Mask, *, border: int, disputed: Sequence[str]
) -> dict[str, Any]:
    """Count one tile.

    Pixels and objects are counted in the owned region, less `border` px at the tile's edge. A boundary band (2 % of
    the tile's diagonal wide) is drawn in the whole tile, so that a cut through a cell is no outline.

    Args:
        tile: A tile row with `PLACE` and `once_left|top|right|bottom`: its owned region, the box (tile px) of the
            pixels that only this tile counts.
        masks: Model -> (H, W) bool, predicted.
        truth: (H, W) bool, annotated.
        border: Px at the tile's edge that are not counted.
        disputed: The models of `disagreement`.

    Returns:
        A row of `per_tile_schema`. `disagreement` is the share of the region's pixels that all `disputed` models call
        differently from the annotation: candidates for another look, as in the paper's technical validation.
    """
    height, width = truth.shape
    region = counted_region(tile, height, width, border)
    row: dict[str, Any] = {name: tile[name] for name in PLACE}
    counters = [metric.counter(truth, region) for metric in METRICS]
    for model, mask in masks.items():
        counted = confusion(mask[region], truth[region])
        for count in counters:
            counted |= count(mask)
        row |= {f"{model}_{name}": value for name, value in counted.items()}
    wrong = np.logical_and.reduce([masks[model][region] != truth[region] for model in disputed])
    row["disagreement"] = float(wrong.mean()) if wrong.size else 0.0
    return row


def counted_region(tile: Mapping[str, Any], height: int, width: int, border: int) -> tuple[slice, slice]:
    """Return rows and columns of a tile that are counted: its owned region, less `border` px at its edge."""
    left, top, right, bottom = (int(tile[f"once_{side}"]) for side in ("left", "top", "right", "bottom"))
    rows = slice(max(top, border), max(0, min(bottom, height - border)))
    return rows, slice(max(left, border), max(0, min(right, width - border)))


def confusion(mask: Mask, truth: Mask) -> dict[str, int]:
    """Count the pixels that are cell in both (tp), in `mask` only (fp), in neither (tn), in `truth` only (fn)."""
    both, predicted, true = (int(np.count_nonzero(px)) for px in (mask & truth, mask, truth))
    return {"tp": both, "fp": predicted - both, "tn": truth.size - predicted - true + both, "fn": true - both}
