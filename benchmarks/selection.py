"""Rules that choose among candidates by counts of pixels on units, as `apacs_ray.evaluation.selection` has them.

Pure arithmetic on (units, candidates, 3) pixels: cell by both, by the candidate, and in truth.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from apacs_ray.evaluation.bootstrap import resample
from apacs_ray.evaluation.selection import paired_errors, pooled_dice

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


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
