"""Whether a network's probabilities are what they say: of pixels with 0.8, four of five should be cell.

Counts of a tile by bins of probability, integers only, so that tiles add up in any order; nothing keeps a pixel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from apacs_ray.evaluation.predictions import Mask

BINS = 10  # evenly wide
STEPS = 255  # probabilities are rounded to these, as in stored heatmaps
COUNTS = ("bin_pixels", "bin_cells", "bin_steps")
_edges = np.ceil(np.arange(BINS) * (STEPS + 1) / BINS).astype(int)


def calibration_schema(network: str) -> pa.Schema:
    """Return the columns `<network>_<count>` of `COUNTS`, lists of `BINS` whole numbers.

    In each bin: pixels, those of them that are cell, and the sum of their probabilities in 1 / `STEPS`.
    """
    return pa.schema([(f"{network}_{count}", pa.list_(pa.int64())) for count in COUNTS])


def calibration_row(network: str, probabilities: npt.NDArray[np.float32], truth: Mask) -> dict[str, list[int]]:
    """Count the pixels of a tile.

    Args:
        network: Its key.
        probabilities: (H, W) float32, 0..1.
        truth: (H, W) bool, annotated.

    Returns:
        A row of `calibration_schema`.
    """
    steps = np.rint(probabilities * STEPS).astype(np.uint8)
    pixels, cells = (np.bincount(part, minlength=STEPS + 1) for part in (steps.ravel(), steps[truth]))
    values = (pixels, cells, pixels * np.arange(STEPS + 1))
    return {
        f"{network}_{name}": np.add.reduceat(value, _edges).tolist() for name, value in zip(COUNTS, values, strict=True)
    }


def calibration(table: pa.Table, network: str) -> dict[str, Any]:
    """Pool the counts of all tiles.

    Args:
        table: With the columns of `calibration_schema`.
        network: Its key.

    Returns:
        `pixels` and `cells` of each bin; `confidence`, the mean probability there, null where there is no pixel; and
        `ece`, the expected calibration error (Naeini et al., 2015): the mean over pixels of the distance between
        confidence and share of cells in their bin, null without pixels.
    """
    pixels, cells, steps = (_pooled(table, f"{network}_{name}") for name in COUNTS)
    total = int(pixels.sum())
    return {
        "pixels": pixels.tolist(),
        "cells": cells.tolist(),
        "confidence": [
            int(part) / (STEPS * int(count)) if count else None for part, count in zip(steps, pixels, strict=True)
        ],
        "ece": float(np.abs(cells - steps / STEPS).sum() / total) if total else None,
    }


def _pooled(table: pa.Table, column: str) -> npt.NDArray[np.int64]:
    values = table[column].combine_chunks().flatten().to_numpy().reshape(-1, BINS)
    return np.asarray(values.sum(axis=0, dtype=np.int64))
