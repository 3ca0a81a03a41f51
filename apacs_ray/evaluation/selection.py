"""Choosing among candidates by counts of pixels on units (slides, or groups of tiles of too few of them).

One validation slide tells little: the candidate that is best there by a hair is often not the best on the next. So a
difference counts only if it is larger than its standard error, found from the units themselves. Everything is paired:
two candidates are compared on the same units, whose difficulty then does not matter.

Pure arithmetic on (units, candidates, 3) pixels: cell by both, by the candidate, and in truth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from apacs_ray.evaluation.metrics import ENOUGH_SLIDES

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
MOST_UNITS = 50  # more tell the error no better


def unit_numbers(slide_ids: Sequence[str], tile_ids: Sequence[str]) -> dict[str, int]:
    """Return the unit, from 0, of each tile: its slide where there are enough of them, else the tile.

    Of more than `MOST_UNITS` several share a number, dealt out in the order of their names.
    """
    slides = sorted(set(slide_ids))
    if len(slides) >= ENOUGH_SLIDES:
        number = {slide: place % MOST_UNITS for place, slide in enumerate(slides)}
        return {tile: number[slide] for tile, slide in zip(tile_ids, slide_ids, strict=True)}
    return {tile: place % MOST_UNITS for place, tile in enumerate(sorted(tile_ids))}


def pooled_dice(counts: Counts) -> Floats:
    """Return Dice along the last axis of counts (..., 3); 0 where nothing is true and nothing predicted."""
    both, predicted, true = np.moveaxis(counts.astype(np.float64), -1, 0)
    total = predicted + true
    return np.asarray(2 * both / np.where(total > 0, total, 1.0))


def paired_errors(units: Counts, reference: int) -> Floats:
    """Return the standard error of each candidate's pooled Dice less that of `reference`, by the jackknife over units.

    Args:
        units: (units, candidates, 3).
        reference: Its place among the candidates.

    Returns:
        (candidates,); 0 of the reference; infinite with fewer than two units, which say nothing of others.
    """
    count = len(units)
    if count < 2:
        errors = np.full(units.shape[1], np.inf)
        errors[reference] = 0.0
        return errors
    left_out = pooled_dice(units.sum(axis=0) - units)
    differences = left_out - left_out[:, [reference]]
    spread = ((differences - differences.mean(axis=0)) ** 2).sum(axis=0)
    return np.asarray(np.sqrt(spread * (count - 1) / count))
