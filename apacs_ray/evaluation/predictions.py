"""Masks of every model for one tile: the networks, two plain ways of combining them, and Otsu as a floor."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import numpy as np
import numpy.typing as npt

from apacs_ray.errors import ApacsError
from apacs_ray.models.registry import FUSIONS, MEMBERS

Mask = npt.NDArray[np.bool_]
MODEL_KEYS = (*MEMBERS, "majority", "mean", *FUSIONS, "otsu")


def predictions(
    logits: Mapping[str, npt.NDArray[np.float32]],
    rgb: npt.NDArray[np.uint8],
    probabilities: Mapping[str, npt.NDArray[np.float32]] | None = None,
) -> dict[str, Mask]:
    """Threshold the networks' logits, and combine those of the members.

    A network's pixel is cell where its logit >= 0 (probability 0.5). `majority`: more than half of the thresholded
    members; `mean`: mean probability >= 0.5; `otsu`: Otsu's threshold on the green channel, dark is cell.

    Args:
        logits: Network -> (H, W) float32, of all members and of any fusions.
        rgb: (H, W, 3) uint8.
        probabilities: Their `sigmoid`, where that is known.

    Returns:
        Model -> (H, W) bool, in the order of `MODEL_KEYS`.

    Raises:
        ApacsError: A logit is no finite number; it would pass for background or cell.
    """
    for name, output in logits.items():
        if not np.isfinite(output).all():
            raise ApacsError(f"{name}: logits are not finite; its weights are damaged or its training diverged")
    masks = {name: output >= 0 for name, output in logits.items()}
    if probabilities is None:
        probabilities = {name: sigmoid(logits[name]) for name in MEMBERS}
    votes = reduce(np.add, [masks[name].view(np.uint8) for name in MEMBERS])
    masks["majority"] = votes > len(MEMBERS) / 2
    masks["mean"] = reduce(np.add, [probabilities[name] for name in MEMBERS]) / len(MEMBERS) >= 0.5
    masks["otsu"] = otsu(rgb[:, :, 1])
    return {key: masks[key] for key in MODEL_KEYS if key in masks}


def sigmoid(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the probability 0..1 of each logit, without overflow.

    scipy's `expit` differs in the last bit for a third of all logits, which changes a heatmap's pixel now and then.

    Args:
        logits: Of any shape, float32.

    Returns:
        float32 of the same shape.
    """
    tail = np.abs(logits)  # in place from here on: a new array costs as much as what is computed
    np.exp(np.negative(tail, out=tail), out=tail)
    probabilities = np.where(logits >= 0, np.float32(1), tail)
    tail += 1
    probabilities /= tail
    return probabilities


def otsu(green: npt.NDArray[np.uint8]) -> Mask:
    """Split a channel by Otsu's threshold (1979), that of the largest variance between classes.

    Args:
        green: (H, W) uint8.

    Returns:
        (H, W) bool: darker pixels are cell; a constant tile has none.
    """
    histogram = np.bincount(green.ravel(), minlength=256).astype(np.float64)
    below = np.cumsum(histogram)
    weighted = np.cumsum(histogram * np.arange(256))
    above = below[-1] - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (weighted / below - (weighted[-1] - weighted) / above) ** 2
    between[~np.isfinite(between)] = 0
    if not between.any():
        return np.zeros(green.shape, bool)
    return green <= int(between.argmax())
