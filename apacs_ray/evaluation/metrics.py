"""From per-tile counts to `metrics.json`: pooled figures, means over tiles, figures by slide, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

RESAMPLES = 2000
ENOUGH_SLIDES = 5  # from which slides are resampled; with fewer, tiles
CHUNK = 100  # resamples at a time: bounds memory at CHUNK x units
Counts = npt.NDArray[np.int64]  # (..., 4): tp, fp, tn, fn


def summarize(per_tile: pa.Table, models: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """`metrics.json`: for each model pooled counts and ratios, tile means, boundary IoU, objects, slides, intervals.

    Ratios are in 0..1, null where they are 0/0; tiles with an undefined ratio are left out of the means and counted.
    """
    slides = np.array(per_tile["slide_id"].to_pylist())
    return {model: _summary(per_tile, model, slides, seed) for model in models}


def _summary(table: pa.Table, model: str, slides: npt.NDArray[Any], seed: int) -> dict[str, Any]:
    counts = pixel_counts(table, model)
    pooled = counts.sum(axis=0)
    dice, iou = dice_of(counts), iou_of(counts)
    defined = ~np.isnan(dice)
    edges = [int(table[f"{model}_boundary_{part}"].to_numpy().sum()) for part in ("intersection", "union")]
    objects = [int(table[f"{model}_objects_{part}"].to_numpy().sum()) for part in ("tp", "fp", "fn")]
    units, kind = _units(counts, slides)
    samples = bootstrap(units, seed)
    return {
        **ratios(pooled),
        "mean_iou": float(iou[defined].mean()) if defined.any() else None,
        "mean_dice": float(dice[defined].mean()) if defined.any() else None,
        "boundary_iou": edges[0] / edges[1] if edges[1] else None,
        "tiles": len(counts),
        "undefined_tiles": int((~defined).sum()),
        "objects": dict(zip(("tp", "fp", "fn"), objects, strict=True)),
        "object_f1": 2 * objects[0] / (2 * objects[0] + objects[1] + objects[2]) if sum(objects) else None,
        "per_slide": {
            str(slide): {**ratios(counts[slides == slide].sum(axis=0)), "tiles": int((slides == slide).sum())}
            for slide in np.unique(slides)
        },
        "iou_ci95": interval(iou_of(samples)) if len(units) > 1 else None,
        "dice_ci95": interval(dice_of(samples)) if len(units) > 1 else None,
        "ci_unit": kind,
    }


def pixel_counts(table: pa.Table, model: str) -> Counts:
    """(tiles, 4) tp, fp, tn, fn."""
    return np.stack([table[f"{model}_{part}"].to_numpy() for part in ("tp", "fp", "tn", "fn")], axis=1)


def ratios(counts: Counts) -> dict[str, Any]:
    """Counts (4,) with their accuracy, IoU and Dice (the paper's metrics)."""
    tp, fp, tn, fn = (int(count) for count in counts)
    total, union = tp + fp + tn + fn, tp + fp + fn
    return {
        "tp": tp,
        "fp": fp,
        "tn": tn,
        "fn": fn,
        "accuracy": (tp + tn) / total if total else None,
        "iou": tp / union if union else None,
        "dice": 2 * tp / (2 * tp + fp + fn) if union else None,
    }


def dice_of(counts: Counts) -> npt.NDArray[np.float64]:
    """2 tp / (2 tp + fp + fn) along the last axis; NaN where it is 0/0."""
    tp, fp, _, fn = np.moveaxis(counts.astype(np.float64), -1, 0)
    with np.errstate(invalid="ignore"):
        return np.asarray(2 * tp / (2 * tp + fp + fn))


def iou_of(counts: Counts) -> npt.NDArray[np.float64]:
    """tp / (tp + fp + fn) along the last axis; NaN where it is 0/0."""
    tp, fp, _, fn = np.moveaxis(counts.astype(np.float64), -1, 0)
    with np.errstate(invalid="ignore"):
        return np.asarray(tp / (tp + fp + fn))


def _units(counts: Counts, slides: npt.NDArray[Any]) -> tuple[Counts, str]:
    """Counts of what is resampled: slides where there are enough of them, else tiles."""
    names, index = np.unique(slides, return_inverse=True)
    if len(names) < ENOUGH_SLIDES:
        return counts, "tile"
    pooled = np.zeros((len(names), *counts.shape[1:]), np.int64)
    np.add.at(pooled, index, counts)
    return pooled, "slide"


def bootstrap(units: Counts, seed: int) -> Counts:
    """(RESAMPLES, ...) pooled counts of units drawn with replacement; the same draws for the same seed and size."""
    rng = np.random.default_rng([seed, 13])
    flat = units.reshape(len(units), -1)
    shares = np.full(len(units), 1 / max(len(units), 1))
    drawn = [rng.multinomial(len(units), shares, size=CHUNK) @ flat for _ in range(RESAMPLES // CHUNK)]
    return np.concatenate(drawn).reshape(RESAMPLES, *units.shape[1:])


def interval(values: npt.NDArray[np.float64]) -> list[float] | None:
    """Percentile interval (95 %); None when no resample was defined."""
    known = values[~np.isnan(values)]
    return [float(bound) for bound in np.percentile(known, [2.5, 97.5])] if len(known) else None


def compare(per_tile: pa.Table, models: Sequence[str], reference: str, seed: int) -> dict[str, dict[str, Any]]:
    """Paired bootstrap of the pooled Dice of `reference` less that of each other model, on the same draws."""
    slides = np.array(per_tile["slide_id"].to_pylist())
    units, kind = _units(np.stack([pixel_counts(per_tile, model) for model in models], axis=1), slides)
    pooled, samples = dice_of(units.sum(axis=0)), dice_of(bootstrap(units, seed))
    at = list(models).index(reference)
    found = {}
    for number, model in enumerate(models):
        if model != reference:
            span = interval(samples[:, at] - samples[:, number]) if len(units) > 1 else None
            found[model] = {
                "dice_difference": float(pooled[at] - pooled[number]),
                "ci95": span,
                "unit": kind,
                "significant": span is not None and not span[0] <= 0 <= span[1],
            }
    return found
