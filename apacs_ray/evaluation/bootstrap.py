"""Percentile bootstrap of pooled counts: whole units (slides or tiles) are drawn, ratios taken of their sums."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
WEIGHTS_AT_ONCE = 1 << 22  # drawn weights held at a time: bounds memory to 32 MiB, whatever the number of units
STREAM = 13  # keeps these draws apart from others of the same seed
Counts = npt.NDArray[np.int64]


def resample(units: Counts, seed: int) -> Counts:
    """Sum the counts of units that are drawn with replacement, `RESAMPLES` times.

    The same seed and number of units give the same draws, so figures of two models that lie side by side in `units`
    (or come from two calls) are paired. Sums are exact while they stay below 2**53.

    Args:
        units: (units, ...) counts, int64.
        seed: Of the draws.

    Returns:
        (RESAMPLES, ...) sums over as many draws as there are units, int64.
    """
    count = len(units)
    flat = units.reshape(count, -1).astype(np.float64)  # whole numbers: adding is exact in any order
    rng = np.random.default_rng([seed, STREAM])
    sums = np.empty((RESAMPLES, flat.shape[1]))
    step = max(1, WEIGHTS_AT_ONCE // count)
    for start in range(0, RESAMPLES, step):
        weights = np.empty((min(step, RESAMPLES - start), count))
        for weight in weights:
            weight[:] = np.bincount(rng.integers(count, size=count), minlength=count)
        sums[start : start + len(weights)] = weights @ flat
    return np.rint(sums).astype(np.int64).reshape(RESAMPLES, *units.shape[1:])


def interval(values: npt.NDArray[np.float64]) -> list[float] | None:
    """Return the 2.5 % and 97.5 % percentiles of resampled values. NaN (undefined) is left out; None when all are."""
    defined = values[~np.isnan(values)]
    return [float(bound) for bound in np.percentile(defined, [2.5, 97.5])] if len(defined) else None
