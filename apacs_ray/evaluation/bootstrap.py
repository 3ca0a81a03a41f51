"""Percentile bootstrap of pooled figures: units are drawn whole, and ratios are taken of their summed counts."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
CELLS = 1 << 22  # drawn weights held at a time: bounds memory to 32 MiB, whatever the number of units
STREAM = 13  # keeps these draws apart from others of the same seed
Whole = npt.NDArray[np.int64]


def resample(units: Whole, seed: int) -> Whole:
    """(RESAMPLES, ...) sums over `len(units)` units drawn with replacement from `units` (units, ...).

    The same seed and number of units give the same draws, so figures of two models that lie side by side in
    `units` (or come from two calls) are paired. Sums are exact while they stay below 2**53.
    """
    count = len(units)
    flat = units.reshape(count, -1).astype(np.float64)  # whole numbers: adding is exact in any order
    rng = np.random.default_rng([seed, STREAM])
    sums = np.empty((RESAMPLES, flat.shape[1]))
    step = max(1, CELLS // count)
    for start in range(0, RESAMPLES, step):
        weights = np.empty((min(step, RESAMPLES - start), count))
        for weight in weights:
            weight[:] = np.bincount(rng.integers(count, size=count), minlength=count)
        sums[start : start + len(weights)] = weights @ flat
    return np.rint(sums).astype(np.int64).reshape(RESAMPLES, *units.shape[1:])


def interval(values: npt.NDArray[np.float64]) -> list[float] | None:
    """[2.5 %, 97.5 %] of the resampled values. Undefined ones (NaN) are left out; None when all are."""
    known = values[~np.isnan(values)]
    return [float(bound) for bound in np.percentile(known, [2.5, 97.5])] if len(known) else None
