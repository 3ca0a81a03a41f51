"""Cells as objects: connected components, matched one to one, and the outlines of masks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from apacs_ray.evaluation.predictions import Mask

Labels = npt.NDArray[np.int32]
MATCH_IOU = 0.5  # from which a predicted object is the annotated one
SMALLEST_OBJECT = 16  # px; smaller components are specks, which do not count
EIGHT = np.ones((3, 3), bool)


def components(mask: Mask) -> Labels:
    """Number the 8-connected components of a mask, (H, W) bool, from 1 in reading order of their first pixels."""
    return np.asarray(ndimage.label(mask, EIGHT)[0], np.int32)


def label_objects(mask: Mask) -> Labels:
    """Number the 8-connected components of at least `SMALLEST_OBJECT` px.

    Cells that touch or overlap are one object, as in the annotations of the paper.

    Args:
        mask: (H, W) bool.

    Returns:
        (H, W) int32, 0 for background and for smaller components; the others are numbered on without gaps.
    """
    labels = components(mask)
    large = np.bincount(labels[mask], minlength=1) >= SMALLEST_OBJECT
    if large[1:].all():
        return labels
    numbers: Labels = (np.cumsum(large) * large).astype(np.int32)
    return numbers.take(labels)


def match_objects(predicted: Labels, true: Labels) -> dict[str, int]:
    """Match the objects of two label images one to one at IoU >= 0.5.

    Above one half an object has one partner at most. At exactly one half it may have two (the halves of it);
    the one labeled first is taken, and no other choice would match more.

    Args:
        predicted: (H, W) int32, 0 for background.
        true: The annotated objects, likewise.

    Returns:
        `objects_tp` (matched), `objects_fp` (predicted only) and `objects_fn` (annotated only).
    """
    inside = np.flatnonzero(predicted != 0)  # most px are background in both
    here, there = predicted.take(inside), true.take(inside)
    predicted_areas = np.bincount(here, minlength=1)
    true_areas = np.bincount(true[true > 0], minlength=1)
    columns = len(true_areas)
    pairs = np.bincount(here.astype(np.int64) * columns + there)
    rows, others = np.divmod(np.flatnonzero(pairs), columns)
    overlaps = pairs[pairs > 0]
    union = predicted_areas[rows] + true_areas[others] - overlaps
    partners = (rows > 0) & (others > 0) & (overlaps >= MATCH_IOU * union)
    matched_rows: set[int] = set()
    matched_others: set[int] = set()
    for row, other in zip(rows[partners].tolist(), others[partners].tolist(), strict=True):
        if row not in matched_rows and other not in matched_others:
            matched_rows.add(row)
            matched_others.add(other)
    matched = len(matched_rows)
    return {
        "objects_tp": matched,
        "objects_fp": int((predicted_areas[1:] > 0).sum()) - matched,
        "objects_fn": int((true_areas[1:] > 0).sum()) - matched,
    }


def boundary(mask: Mask, band: int) -> Mask:
    """Return the pixels of a mask near its outline, as in boundary IoU (Cheng et al., CVPR 2021).

    They are what `band` erosions by a 3 x 3 square take away; the tile's edge is no outline.

    Args:
        mask: (H, W) bool.
        band: Largest distance from the outline, px (chessboard).

    Returns:
        (H, W) bool.
    """
    inner = np.pad(mask, band, constant_values=True)
    for axis in (0, 1):  # px whose neighbors up to `width - 1` further along it are of the mask, too
        width, last = 1, 2 * band + 1
        while width < last:
            step = min(width, last - width)
            inner = (inner[:-step] & inner[step:]) if axis == 0 else (inner[:, :-step] & inner[:, step:])
            width += step
    return np.asarray(mask & ~inner)
