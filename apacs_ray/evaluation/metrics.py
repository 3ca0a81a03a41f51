"""From per-tile counts to `metrics.json`: pooled figures, tile means, figures by slide, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from apacs_ray.evaluation.bootstrap import interval, resample
from apacs_ray.evaluation.per_tile import PIXELS
from apacs_ray.evaluation.registry import METRICS

ENOUGH_SLIDES = 5  # from which slides are resampled; with fewer, tiles
Counts = npt.NDArray[np.int64]  # (..., 4): tp, fp, tn, fn
Ratios = npt.NDArray[np.float64]


def summarize(per_tile: pa.Table, models: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """Compute `metrics.json`: each model's pooled counts and ratios, tile means, boundary IoU, objects and intervals.

    Args:
        per_tile: Rows of `per_tile_schema`, in any order.
        models: Names in the table's columns, in the order of the result.
        seed: Of the bootstrap.

    Returns:
        Model -> its figures. Ratios are in 0..1, null where they are 0/0; tiles with an undefined ratio are left out
        of the means and counted (`undefined_tiles`). `iou_ci95` and `dice_ci95` are null with a single unit.
    """
    table = per_tile.sort_by("tile_id")
    slides = _Slides(table)
    counts = np.stack([pixel_counts(table, model) for model in models], axis=1)
    units, kind = slides.units(counts)
    drawn = resample(units, seed) if len(units) > 1 else None
    metrics = {}
    for column, model in enumerate(models):
        metrics[model] = {
            **ratios(counts[:, column].sum(axis=0)),
            **_tile_means(counts[:, column]),
            **_pooled_metrics(table, model),
            "per_slide": slides.figures(counts[:, column]),
            "iou_ci95": None if drawn is None else interval(iou_of(drawn[:, column])),
            "dice_ci95": None if drawn is None else interval(dice_of(drawn[:, column])),
            "ci_unit": kind,
        }
    return metrics


def compare(per_tile: pa.Table, models: Sequence[str], reference: str, seed: int) -> dict[str, dict[str, Any]]:
    """Compare the pooled Dice of `reference` with that of each other model by a paired bootstrap, on the same draws.

    Args:
        per_tile: Rows of `per_tile_schema`, in any order.
        models: Names in the table's columns, `reference` among them.
        reference: The model whose Dice the others' are subtracted from.
        seed: Of the bootstrap.

    Returns:
        Other model -> `dice_difference` (null where a Dice is undefined), `ci95` (null for one unit), the resampled
        `unit` (slide or tile), and `significant`: the interval does not hold 0.
    """
    table = per_tile.sort_by("tile_id")
    units, kind = _Slides(table).units(np.stack([pixel_counts(table, model) for model in models], axis=1))
    pooled = dice_of(units.sum(axis=0))
    drawn = dice_of(resample(units, seed)) if len(units) > 1 else None
    column = list(models).index(reference)
    comparison = {}
    for other, model in enumerate(models):
        if model != reference:
            span = None if drawn is None else interval(drawn[:, column] - drawn[:, other])
            comparison[model] = {
                "dice_difference": _number(pooled[column] - pooled[other]),
                "ci95": span,
                "unit": kind,
                "significant": span is not None and not span[0] <= 0 <= span[1],
            }
    return comparison


def pixel_counts(table: pa.Table, model: str) -> Counts:
    """Return (tiles, 4) tp, fp, tn, fn of a model, in the order of the rows."""
    return np.stack([table[f"{model}_{part}"].to_numpy() for part in PIXELS], axis=1)


def ratios(counts: Counts) -> dict[str, Any]:
    """Return counts (4,) by name with their accuracy, IoU and Dice (the paper's metrics); null where 0/0."""
    tp, fp, tn, fn = (int(count) for count in counts)
    total, union = tp + fp + tn + fn, tp + fp + fn
    return {
        **dict(zip(PIXELS, (tp, fp, tn, fn), strict=True)),
        "accuracy": (tp + tn) / total if total else None,
        "iou": tp / union if union else None,
        "dice": 2 * tp / (2 * tp + fp + fn) if union else None,
    }


def dice_of(counts: Counts) -> Ratios:
    """Return Dice, 2 tp / (2 tp + fp + fn), along the last axis of counts; NaN where it is 0/0."""
    tp, fp, _, fn = np.moveaxis(counts.astype(np.float64), -1, 0)
    with np.errstate(invalid="ignore"):
        return np.asarray(2 * tp / (2 * tp + fp + fn))


def iou_of(counts: Counts) -> Ratios:
    """Return IoU, tp / (tp + fp + fn), along the last axis of counts; NaN where it is 0/0."""
    tp, fp, _, fn = np.moveaxis(counts.astype(np.float64), -1, 0)
    with np.errstate(invalid="ignore"):
        return np.asarray(tp / (tp + fp + fn))


class _Slides:
    """The slide of each row of a table."""

    def __init__(self, table: pa.Table) -> None:
        encoded = table["slide_id"].combine_chunks().dictionary_encode()
        names = encoded.dictionary.to_pylist()
        order = sorted(range(len(names)), key=names.__getitem__)
        rank = np.empty(len(names), np.int64)
        rank[order] = np.arange(len(names))
        self.names = [names[number] for number in order]
        self.index = rank[encoded.indices.to_numpy()]

    def units(self, counts: Counts) -> tuple[Counts, str]:
        """Return the counts that are resampled, and their unit: slides where there are enough of them, else tiles."""
        return (counts, "tile") if len(self.names) < ENOUGH_SLIDES else (self._pooled(counts), "slide")

    def figures(self, counts: Counts) -> dict[str, dict[str, Any]]:
        """Pool counts (tiles, 4): slide id -> counts, their ratios, and the number of tiles."""
        tiles = np.bincount(self.index, minlength=len(self.names)).tolist()
        rows = zip(self.names, self._pooled(counts), tiles, strict=True)
        return {name: {**ratios(pooled), "tiles": number} for name, pooled, number in rows}

    def _pooled(self, counts: Counts) -> Counts:
        pooled = np.zeros((len(self.names), *counts.shape[1:]), np.int64)
        np.add.at(pooled, self.index, counts)
        return pooled


def _tile_means(counts: Counts) -> dict[str, Any]:
    """Average over the tiles whose IoU and Dice are defined (the two share their 0/0), and count the others."""
    iou, dice = iou_of(counts), dice_of(counts)
    defined = ~np.isnan(dice)
    return {
        "mean_iou": float(iou[defined].mean()) if defined.any() else None,
        "mean_dice": float(dice[defined].mean()) if defined.any() else None,
        "tiles": len(counts),
        "undefined_tiles": int((~defined).sum()),
    }


def _pooled_metrics(table: pa.Table, model: str) -> dict[str, Any]:
    """The other metrics, from their counts summed over the tiles."""
    values: dict[str, Any] = {}
    for metric in METRICS:
        values |= metric.pool({count: int(table[f"{model}_{count}"].to_numpy().sum()) for count in metric.counts})
    return values


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
