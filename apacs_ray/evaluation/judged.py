"""One tile as `per_tile.parquet` has it: what every model says of it, counted against its annotation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from apacs_ray.evaluation.calibration import calibration_row
from apacs_ray.evaluation.changes import changes_row
from apacs_ray.evaluation.per_tile import counted_region, tile_row
from apacs_ray.evaluation.predictions import Mask, predictions, sigmoid
from apacs_ray.models.registry import MEMBERS


def judged(
    rgb: npt.NDArray[np.uint8],
    logits: Mapping[str, npt.NDArray[np.float32]],
    tile: Mapping[str, Any],
    truth: Mask,
    *,
    border: int,
    member: str,
) -> dict[str, Any]:
    """Count one tile for all models.

    Args:
        rgb: (H, W, 3) uint8.
        logits: Network -> (H, W) float32, of all members and of any fusions.
        tile: As `tile_row` takes it.
        truth: (H, W) bool, annotated.
        border: Px at the tile's edge that are not counted.
        member: The one that the fusion is held against.

    Returns:
        The columns of `tile_row`, of `calibration_row` for each network, and of `changes_row`.

    Raises:
        ApacsError: A logit is no finite number.
    """
    probabilities = {name: sigmoid(output) for name, output in logits.items()}
    masks = predictions(logits, rgb, probabilities)
    row = tile_row(tile, masks, truth, border=border, disputed=MEMBERS)
    region = counted_region(tile, truth.shape[0], truth.shape[1], border)
    for name, values in probabilities.items():
        row |= calibration_row(name, values[region], truth[region])
    return row | changes_row(masks["fusion"][region], masks[member][region], truth[region])
