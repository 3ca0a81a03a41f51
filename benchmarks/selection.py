"""Choosing among candidates by counts of pixels on units (slides, or tiles of too few of them), heeding chance.

One slide tells little: the candidate that is best there by a hair is often not the best on the next. So a difference
counts only if it is larger than its standard error, found from the units themselves. Everything is paired: two
candidates are compared on the same units, whose difficulty then does not matter.

Pure arithmetic on (units, candidates, 3) pixels: cell by both, by the candidate, and in truth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from apacs_ray.evaluation.bootstrap import resample

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


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


def choose(units: Counts, preferred: Sequence[int], errors: float = 1.0) -> int:
    """Return the candidate to take: the first of `preferred`, unless another is better by more than chance.

    Args:
        units: (units, candidates, 3).
        preferred: All candidates, those that are taken in doubt first.
        errors: Standard errors of the paired difference that count as chance; 0: the best is taken, of equals the
            first.

    Returns:
        Of all whose pooled Dice is within `errors` of that of the best, the first of `preferred`.
    """
    dice = pooled_dice(units.sum(axis=0))
    best = max(preferred, key=lambda place: (dice[place], -list(preferred).index(place)))
    chance = paired_errors(units, best) if errors else np.zeros(len(dice))
    return next(place for place in preferred if dice[best] - dice[place] <= errors * chance[place])


def wins(units: Counts, seed: int = 0) -> Floats:
    """Return how often each candidate has the highest pooled Dice when units are drawn with replacement.

    Args:
        units: (units, candidates, 3).
        seed: Of the draws.

    Returns:
        (candidates,) shares, of sum 1; equals share a win.
    """
    dice = pooled_dice(resample(units, seed)) if len(units) > 1 else pooled_dice(units)
    best = dice >= dice.max(axis=1, keepdims=True)
    return np.asarray((best / best.sum(axis=1, keepdims=True)).mean(axis=0))
