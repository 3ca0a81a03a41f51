"""Masks of polygons.

A pixel belongs to a polygon when its center lies inside: pixel (c, r) of a tile that begins at level-0 (x, y) with
`downsample` d has its center at (x + (c + 0.5) d, y + (r + 0.5) d). A center exactly on an edge belongs to the polygon
on its right or below, so tiles put together equal the whole, and polygons that share an edge share no pixel.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import shapely

from apacs_ray.data.images import Mask
from apacs_ray.slides.annotations.areas import Ring, rings_of
from apacs_ray.slides.annotations.read import Annotations

CROSSINGS_AT_ONCE = 4_000_000  # crossings of rows and edges that are counted at a time


class PolygonMask:
    """The union of a slide's areas, tile by tile; an index finds the areas that a tile touches."""

    def __init__(self, annotations: Annotations) -> None:
        """Index the areas of a slide, which are in level-0 px."""
        self._areas = annotations.areas
        self._tree = shapely.STRtree(annotations.areas)

    def tile(self, x: float, y: float, width: int, height: int, downsample: float) -> Mask:
        """Return the (height, width) bool mask of the tile at level-0 (x, y), `downsample` level-0 px per tile px."""
        mask = np.zeros((height, width), bool)
        window = shapely.box(x, y, x + width * downsample, y + height * downsample)
        for number in self._tree.query(window):
            rings = list(rings_of(self._areas[number]))
            fill(mask, rings, x, y, downsample)
        return mask


def fill(mask: Mask, rings: Sequence[Ring], x: float, y: float, downsample: float) -> None:
    """Set the pixels of a mask whose centers lie inside the rings by the even-odd rule.

    Args:
        mask: (H, W) bool, changed in place.
        rings: (N, 2) float64 each, closed, level-0 px.
        x: left edge of the mask, level-0 px.
        y: top edge of the mask, level-0 px.
        downsample: level-0 px per mask px.
    """
    height, width = mask.shape
    starts = np.concatenate([ring[:-1] for ring in rings])
    ends = np.concatenate([ring[1:] for ring in rings])
    upper = np.where((starts[:, 1] <= ends[:, 1])[:, None], starts, ends)
    lower = np.where((starts[:, 1] <= ends[:, 1])[:, None], ends, starts)
    # rows whose center lies in [upper, lower): the first at or below an end
    first = np.clip(np.ceil((upper[:, 1] - y) / downsample - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil((lower[:, 1] - y) / downsample - 0.5), 0, height).astype(np.int64)
    # where a row crosses an edge, inside and outside change places; `CROSSINGS_AT_ONCE` of these places at a time
    ends_at = np.cumsum(last - first)
    if not len(ends_at) or not ends_at[-1]:
        return
    top, foot = int(first.min()), int(last.max())
    bounds = np.array([min(starts[:, 0].min(), ends[:, 0].min()), max(starts[:, 0].max(), ends[:, 0].max())])
    sides = np.ceil((bounds - x) / downsample - 0.5) + np.array([-1, 1])  # a crossing may be rounded to one further
    left, right = (int(column) for column in np.clip(sides, 0, width))
    shape_ = (foot - top, right - left + 1)
    toggles = np.zeros(shape_[0] * shape_[1], np.int64)
    begin = 0
    while begin < len(ends_at):
        done = ends_at[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends_at, done + CROSSINGS_AT_ONCE, side="right")))
        part = slice(begin, end)
        rows_each = (last - first)[part]
        edges = begin + np.repeat(np.arange(end - begin), rows_each)
        rows = np.arange(len(edges)) - np.repeat(np.cumsum(rows_each) - rows_each, rows_each) + first[edges]
        center = y + (rows + 0.5) * downsample
        share = (center - upper[edges, 1]) / (lower[edges, 1] - upper[edges, 1])
        crossing = upper[edges, 0] + share * (lower[edges, 0] - upper[edges, 0])
        columns = np.clip(np.ceil((crossing - x) / downsample - 0.5), left, right).astype(np.int64)
        toggles += np.bincount((rows - top) * shape_[1] + columns - left, minlength=len(toggles))
        begin = end
    inside = (np.cumsum(toggles.reshape(shape_), axis=1) % 2).astype(bool)[:, :-1]
    mask[top:foot, left:right] |= inside
