"""Regions of a boolean picture: growing and shrinking them by whole squares, and measuring their components.

Squares are run by shifts of the whole array, which for the few pixels that are wanted here is many times faster than
scipy's general structuring elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from apacs_ray.data.images import Mask

EIGHT = np.ones((3, 3), bool)  # neighbors by side or corner


def grown(mask: Mask, reach: int) -> Mask:
    """Grow a mask by everything within `reach` px of it, along rows and columns (a square of 2 * reach + 1)."""
    for axis in (0, 1):
        done = 0
        while done < reach and mask.shape[axis] > 1:
            step = min(reach - done, 2 * done + 1, mask.shape[axis] - 1)  # a longer step would leave a gap
            before, after = _ends(axis, step)
            out = mask.copy()
            out[before] |= mask[after]
            out[after] |= mask[before]
            mask, done = out, done + step
    return mask


def _ends(axis: int, step: int) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    before, after = slice(None, -step), slice(step, None)
    return ((before,), (after,)) if axis == 0 else ((slice(None), before), (slice(None), after))


def opened(mask: Mask, side: int) -> Mask:
    """Return what of the mask a square of `side` px fits into, whole; outside the picture nothing fits."""
    height, width = mask.shape
    if side > min(height, width):
        return np.zeros_like(mask)
    fits = mask
    for axis, length in ((0, height), (1, width)):
        run, known = fits, 1
        while known < side:  # `run` holds runs of `known` px; they double
            step = min(known, side - known)
            before, after = _ends(axis, step)
            run = run[before] & run[after]
            known += step
        fits = run
        assert run.shape[axis] == length - side + 1
    out = np.zeros_like(mask)
    out[: fits.shape[0], : fits.shape[1]] = fits
    for axis in (0, 1):  # every place where the square fits covers `side` px
        known = 1
        while known < side:
            step = min(known, side - known)
            before, after = _ends(axis, step)
            moved = out.copy()
            moved[after] |= out[before]
            out, known = moved, known + step
    return out


def closed(mask: Mask) -> Mask:
    """Return the mask with gaps of one px filled, along rows and columns; nothing is filled at the picture's edge."""
    cross = mask.copy()
    for axis in (0, 1):
        before, after = _ends(axis, 1)
        cross[before] |= mask[after]
        cross[after] |= mask[before]
    inner = cross.copy()
    for axis in (0, 1):
        before, after = _ends(axis, 1)
        inner[before] &= cross[after]
        inner[after] &= cross[before]
    inner[[0, -1], :] = inner[:, [0, -1]] = False
    return np.asarray(inner | mask)


@dataclass(frozen=True)
class Components:
    """The connected components of a mask, numbered from 1; entry 0 of what is measured is the rest of the picture."""

    labels: npt.NDArray[np.int32]
    sizes: npt.NDArray[np.intp]  # px

    @staticmethod
    def of(mask: Mask, structure: Mask | None = EIGHT) -> Components:
        """Label a mask; without a `structure`, px that touch at a corner only are apart."""
        if not mask.any():
            return Components(np.zeros(mask.shape, np.int32), np.array([mask.size]))
        labels, count = ndimage.label(mask, structure)
        return Components(labels, np.bincount(labels.ravel(), minlength=count + 1))

    @property
    def count(self) -> int:
        """Number of components."""
        return len(self.sizes) - 1

    def spans(self) -> npt.NDArray[np.intp]:
        """Return the longer side of each component's bounding box, px."""
        spans = np.zeros(self.count + 1, np.intp)
        for number, place in enumerate(ndimage.find_objects(self.labels), 1):
            spans[number] = max(part.stop - part.start for part in place)
        return spans

    def counts(self, mask: Mask) -> npt.NDArray[np.intp]:
        """Return how many px of each component are in `mask`."""
        return np.bincount(self.labels[mask], minlength=self.count + 1)

    def chosen(self, wanted: Mask) -> Mask:
        """Return the px of the components for which `wanted` (count + 1) says so, (H, W) bool."""
        wanted[0] = False
        if not wanted.any():
            return np.zeros(self.labels.shape, bool)
        return np.asarray(wanted[self.labels])
