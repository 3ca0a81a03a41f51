"""Cells as objects: connected components, matched one to one, and the outlines of masks."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from apacs_ray.evaluation.predictions import Mask

Labels = npt.NDArray[np.int32]
MATCH_IOU = 0.5  # from which a predicted object is the annotated one
SMALLEST_OBJECT = 16  # px; smaller components are specks, neither found nor missed
EIGHT = np.ones((3, 3), bool)


def label_objects(mask: Mask) -> Labels:
    """Label image (H, W), 0 for background: the 8-connected components of at least `SMALLEST_OBJECT` px.

    Cells that touch or overlap are one object, as in the annotations of the paper.
    """
    labels = np.asarray(ndimage.label(mask, EIGHT)[0], np.int32)
    small = np.bincount(labels.ravel()) < SMALLEST_OBJECT
    if small.any() and labels.size:
        small[0] = False
        labels[small[labels]] = 0
    return labels


def match_objects(found: Labels, true: Labels) -> dict[str, int]:
    """Objects of two label images (H, W) matched one to one at IoU >= 0.5.

    Above one half an object has one partner at most. At exactly one half it may have two (the halves of it);
    the one labeled first is taken, and no other choice would match more.
    """
    found_areas, true_areas = np.bincount(found.ravel(), minlength=1), np.bincount(true.ravel(), minlength=1)
    columns = len(true_areas)
    pairs = np.bincount(found.ravel().astype(np.int64) * columns + true.ravel())
    rows, others = np.divmod(np.flatnonzero(pairs), columns)
    overlaps = pairs[pairs > 0]
    union = found_areas[rows] + true_areas[others] - overlaps
    partners = (rows > 0) & (others > 0) & (overlaps >= MATCH_IOU * union)
    taken_rows: set[int] = set()
    taken_others: set[int] = set()
    for row, other in zip(rows[partners].tolist(), others[partners].tolist(), strict=True):
        if row not in taken_rows and other not in taken_others:
            taken_rows.add(row)
            taken_others.add(other)
    matched = len(taken_rows)
    return {
        "objects_tp": matched,
        "objects_fp": int((found_areas[1:] > 0).sum()) - matched,
        "objects_fn": int((true_areas[1:] > 0).sum()) - matched,
    }


def boundary(mask: Mask, band: int) -> Mask:
    """Pixels of the mask (H, W) within `band` px (chessboard) of its outline; the tile's edge is no outline.

    What `band` erosions by a 3 x 3 square take away, as in boundary IoU (Cheng et al., CVPR 2021).
    """
    if mask.all():
        return np.zeros_like(mask)
    inner = ndimage.distance_transform_cdt(mask, "chessboard") > band
    return np.asarray(mask & ~inner)
