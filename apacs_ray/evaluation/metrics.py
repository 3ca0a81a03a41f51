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
    """`metrics.json`: each model's pooled counts and ratios, tile means, boundary IoU, objects, slides, intervals.

    Ratios are in 0..1, null where they are 0/0; tiles with an undefined ratio are left out of the means and
    counted. The order of the table's rows does not matter.
    """
    table = per_tile.sort_by("tile_id")
    slides = _Slides(table)
    counts = np.stack([pixel_counts(table, model) for model in models], axis=1)
    units, kind = slides.units(counts)
    drawn = resample(units, seed) if len(units) > 1 else None
    metrics = {}
    for at, model in enumerate(models):
        metrics[model] = {
            **ratios(counts[:, at].sum(axis=0)),
            **_tile_means(counts[:, at]),
            **_pooled_metrics(table, model),
            "per_slide": slides.figures(counts[:, at]),
            "iou_ci95": None if drawn is None else interval(iou_of(drawn[:, at])),
            "dice_ci95": None if drawn is None else interval(dice_of(drawn[:, at])),
            "ci_unit": kind,
        }
    return metrics


def compare(per_tile: pa.Table, models: Sequence[str], reference: str, seed: int) -> dict[str, dict[str, Any]]:
    """Paired bootstrap of the pooled Dice of `reference` less that of each other model, on the same draws.

    For each other model `dice_difference` (null where a Dice is undefined), `ci95` (null for one unit), the
    resampled `unit`, and `significant`: the interval does not hold 0.
    """
    table = per_tile.sort_by("tile_id")
    units, kind = _Slides(table).units(np.stack([pixel_counts(table, model) for model in models], axis=1))
    pooled = dice_of(units.sum(axis=0))
    drawn = dice_of(resample(units, seed)) if len(units) > 1 else None
    at = list(models).index(reference)
    found = {}
    for other, model in enumerate(models):
        if model != reference:
            span = None if drawn is None else interval(drawn[:, at] - drawn[:, other])
            found[model] = {
                "dice_difference": _number(pooled[at] - pooled[other]),
                "ci95": span,
                "unit": kind,
                "significant": span is not None and not span[0] <= 0 <= span[1],
            }
    return found


def pixel_counts(table: pa.Table, model: str) -> Counts:
    """(tiles, 4) tp, fp, tn, fn."""
    return np.stack([table[f"{model}_{part}"].to_numpy() for part in PIXELS], axis=1)


def ratios(counts: Counts) -> dict[str, Any]:
    """Counts (4,) with their accuracy, IoU and Dice (the paper's metrics); null where 0/0."""
    tp, fp, tn, fn = (int(count) for count in counts)
    total, union = tp + fp + tn + fn, tp + fp + fn
    return {
        **dict(zip(PIXELS, (tp, fp, tn, fn), strict=True)),
        "accuracy": (tp + tn) / total if total else None,
        "iou": tp / union if union else None,
        "dice": 2 * tp / (2 * tp + fp + fn) if union else None,
    }


def dice_of(counts: Counts) -> Ratios:
    """2 tp / (2 tp + fp + fn) along the last axis; NaN where it is 0/0."""
    tp, fp, _, fn = np.moveaxis(counts.astype(np.float64), -1, 0)
    with np.errstate(invalid="ignore"):
        return np.asarray(2 * tp / (2 * tp + fp + fn))


def iou_of(counts: Counts) -> Ratios:
    """tp / (tp + fp + fn) along the last axis; NaN where it is 0/0."""
    tp, fp, _, fn = np.moveaxis(counts.astype(np.float64), -1, 0)
    with np.errstate(invalid="ignore"):
        return np.asarray(tp / (tp + fp + fn))


class _Slides:
    """Which slide each row of the table belongs to."""

    def __init__(self, table: pa.Table) -> None:
        encoded = table["slide_id"].combine_chunks().dictionary_encode()
        names = encoded.dictionary.to_pylist()
        order = sorted(range(len(names)), key=names.__getitem__)
        place = np.empty(len(names), np.int64)
        place[order] = np.arange(len(names))
        self.names = [names[at] for at in order]
        self.index = place[encoded.indices.to_numpy()]

    def units(self, counts: Counts) -> tuple[Counts, str]:
        """Counts of what is resampled: slides where there are enough of them, else tiles."""
        return (counts, "tile") if len(self.names) < ENOUGH_SLIDES else (self._pooled(counts), "slide")

    def figures(self, counts: Counts) -> dict[str, dict[str, Any]]:
        """Slide id -> counts (tiles, 4) pooled over the slide, their ratios, and its tiles."""
        tiles = np.bincount(self.index, minlength=len(self.names)).tolist()
        rows = zip(self.names, self._pooled(counts), tiles, strict=True)
        return {name: {**ratios(pooled), "tiles": number} for name, pooled, number in rows}

    def _pooled(self, counts: Counts) -> Counts:
        pooled = np.zeros((len(self.names), *counts.shape[1:]), np.int64)
        np.add.at(pooled, self.index, counts)
        return pooled


def _tile_means(counts: Counts) -> dict[str, Any]:
    """Means over the tiles whose IoU and Dice are defined (the two share their 0/0), and how many are not."""
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
