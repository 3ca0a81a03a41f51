"""Polygons of masks along the edges of pixels.

A polygon's area is the number of its pixels, and what its rings enclose by the even-odd rule are these pixels exactly:
objects one px wide keep their shape, and polygons of neighboring cores fit. Rings are simple: where an outline meets
itself at a corner of pixels it is cut there.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import shapely
from scipy import ndimage
from shapely.geometry import MultiPolygon, Polygon

from apacs_ray.evaluation.objects import Labels

# of the top, right, bottom and left edge of a pixel, walked with the pixel on the right hand: the pixel ahead (y, x)
AHEAD = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])
OUTSIDE = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])  # the pixel on the left hand, which is no part of it
BEGINS = np.array([(0, 0), (0, 1), (1, 1), (1, 0)])  # the corner (y, x) where the edge begins


def outlines(labels: Labels, x: int, y: int) -> list[Polygon | MultiPolygon]:
    """Return the polygon of each object.

    Args:
        labels: (H, W) int32 of `evaluation.objects.components`.
        x: px of the slide where the array begins.
        y: Likewise.

    Returns:
        One valid geometry for each number from 1 on, px of the slide. Parts of an object that meet only at a corner
        are the parts of a MultiPolygon.
    """
    parts, count = ndimage.label(labels > 0)  # by sides only: each has one outer ring
    rings = _rings(parts, count)
    first = ndimage.find_objects(parts)
    objects: defaultdict[int, list[Polygon]] = defaultdict(list)
    for number, place in enumerate(first, 1):
        shell, *holes = (np.add(ring, (x, y)) for ring in rings[number])
        inside = parts[place] == number
        row, column = divmod(int(inside.argmax()), inside.shape[1])
        label = int(labels[place[0].start + row, place[1].start + column])
        objects[label].append(Polygon(shell, holes))
    return [
        parts_of[0] if len(parts_of) == 1 else MultiPolygon(parts_of)
        for parts_of in (objects[label] for label in sorted(objects))
    ]


def joined(polygons: list[Polygon | MultiPolygon]) -> Polygon | MultiPolygon:
    """Return pieces of one object, as cores cut it, as the polygon that an uncut object has."""
    if len(polygons) == 1:
        return shapely.normalize(polygons[0])
    # a canonical ring begins at a corner, so that removing points on straight lines keeps its beginning
    whole = shapely.normalize(shapely.union_all(polygons, grid_size=1))
    straight: Polygon | MultiPolygon = shapely.simplify(whole, 0)  # type: ignore[assignment]
    return shapely.normalize(straight)  # parts are ordered by all of their points


def _rings(parts: Labels, count: int) -> list[list[list[tuple[int, int]]]]:
    """Return the rings of each part, (x, y) px, open; the outer ring first."""
    padded = np.pad(parts > 0, 1)
    width = padded.shape[1]
    sides, places, nexts = [], [], []
    inside = np.flatnonzero(padded.ravel())
    filled = padded.ravel()
    for side in range(4):
        ahead, outside = (int(step[0]) * width + int(step[1]) for step in (AHEAD[side], OUTSIDE[side]))
        edge = inside[~filled[inside + outside]]
        blocked, free = ~filled[edge + ahead], ~filled[edge + ahead + outside]
        pixel = np.where(blocked, edge, np.where(free, edge + ahead, edge + ahead + outside))
        turn = np.where(blocked, 1, np.where(free, 0, 3))
        sides.append(np.full(len(edge), side))
        places.append(edge)
        nexts.append(pixel * 4 + (side + turn) % 4)
    keys = np.concatenate(places) * 4 + np.concatenate(sides)
    order = np.argsort(keys)
    keys = keys[order]
    follow = np.searchsorted(keys, np.concatenate(nexts)[order])
    pixel, side = np.divmod(keys, 4)
    row, column = np.divmod(pixel, width)
    owner = parts[row - 1, column - 1].tolist()
    xs = (column - 1 + BEGINS[side, 1]).tolist()
    ys = (row - 1 + BEGINS[side, 0]).tolist()
    side_list, next_list = side.tolist(), follow.tolist()
    rings: list[list[list[tuple[int, int]]]] = [[] for _ in range(count + 1)]
    seen = bytearray(len(keys))
    for start in range(len(keys)):  # in reading order: the first edge of a part is on its outer ring
        if seen[start]:
            continue
        corners: list[tuple[int, int]] = []
        edge, before = start, -1
        while not seen[edge]:
            seen[edge] = 1
            if side_list[edge] != before:
                corners.append((xs[edge], ys[edge]))
            before = side_list[edge]
            edge = next_list[edge]
        if before == side_list[start]:
            corners.pop(0)  # the walk began in the middle of a straight line
        _add_simple(rings[owner[start]], corners)
    return rings


def _add_simple(rings: list[list[tuple[int, int]]], corners: list[tuple[int, int]]) -> None:
    """Add a ring, cut where it meets itself; what is cut off goes after what is left of it."""
    path: list[tuple[int, int]] = []
    place: dict[tuple[int, int], int] = {}
    loops = []
    for corner in corners:
        if corner in place:
            begin = place[corner]
            loops.append(path[begin:])
            for gone in path[begin + 1 :]:
                del place[gone]
            del path[begin + 1 :]
        else:
            place[corner] = len(path)
            path.append(corner)
    rings.append(path)
    rings.extend(loops)
