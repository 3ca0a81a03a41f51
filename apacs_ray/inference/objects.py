"""Objects of a mask that is made core by core: what each core holds of them, and the same objects joined over cores.

Cells that touch are one object, as in evaluation. A core gives `Piece`s, polygons in px of the slide, with sums of
whole numbers: joined in any order they give the same object, however the slide was cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry import MultiPolygon, Polygon

from apacs_ray.data.grid import Box
from apacs_ray.data.images import Mask
from apacs_ray.evaluation.objects import Labels, components
from apacs_ray.inference.outlines import outlines
from apacs_ray.slides.annotations.areas import rings_of
from apacs_ray.slides.annotations.rasterize import fill

STEPS = 65535  # in which probabilities are summed: whole numbers add up the same in any order
Values = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class Piece:
    """A part of an object, or all of it.

    Attributes:
        label: Its number in its core, from 1.
        polygon: Along the edges of pixels, px of the slide.
        pixels: That the networks call cell.
        probability: Sum over these, in 1 / `STEPS`.
        disagreement: Likewise.
        first: (row, column) of its first pixel in reading order, px of the slide.
        filled: Pixels of holes that were filled, which are in `polygon`, too.
    """

    label: int
    polygon: Polygon | MultiPolygon
    pixels: int
    probability: int
    disagreement: int
    first: tuple[int, int]
    filled: int = 0

    @property
    def size(self) -> int:
        """Pixels of the mask."""
        return self.pixels + self.filled


@dataclass(frozen=True)
class Edges:
    """The labels along the four sides of a core, int32, 0 for background: where objects may go on in its neighbors."""

    top: Labels
    bottom: Labels
    left: Labels
    right: Labels


@dataclass(frozen=True)
class CoreObjects:
    """The pieces in one core, by label from 1 on, and the labels along its sides; none where there are no pieces."""

    box: Box
    pieces: tuple[Piece, ...]
    edges: Edges | None

    def closed(self) -> list[Piece]:
        """Return the pieces that cannot go on in the core's neighbors."""
        if self.edges is None:
            return []
        sides = (self.edges.top, self.edges.bottom, self.edges.left, self.edges.right)
        going_on = set(np.unique(np.concatenate(sides)).tolist())
        return [piece for piece in self.pieces if piece.label not in going_on]


@dataclass(frozen=True)
class SlideObject:
    """One object of a slide; as `Piece`, with everything that belongs to it.

    Attributes:
        holes: Those of `filled` that are not yet in the masks of the cores.
    """

    polygon: Polygon | MultiPolygon
    pixels: int
    probability: int
    disagreement: int
    first: tuple[int, int]
    filled: int = 0
    holes: tuple[Polygon, ...] = ()

    @property
    def size(self) -> int:
        """Pixels of the mask."""
        return self.pixels + self.filled


def core_objects(mask: Mask, probability: Values, disagreement: Values, box: Box) -> CoreObjects:
    """Find the pieces of objects in a core.

    Args:
        mask: (H, W) bool.
        probability: (H, W) uint16, in 1 / `STEPS`.
        disagreement: (H, W) uint16, the standard deviation of the members' probabilities, likewise.
        box: Where the core lies, px of the slide.

    Returns:
        Its pieces and edges.
    """
    labels = components(mask)
    polygons = outlines(labels, box.x, box.y)
    if not polygons:
        return CoreObjects(box, (), None)
    inside = np.flatnonzero(labels)
    numbers = labels.ravel()[inside]
    pixels = np.bincount(numbers)
    sums = [
        np.bincount(numbers, values.ravel()[inside]).astype(np.int64)  # exact: doubles hold such sums
        for values in (probability, disagreement)
    ]
    places = np.zeros(len(pixels), np.int64)
    places[numbers[::-1]] = inside[::-1]  # of equal numbers the last that is written is the first in reading order
    rows, columns = np.divmod(places, labels.shape[1])
    pieces = tuple(
        Piece(
            number,
            polygon,
            int(pixels[number]),
            int(sums[0][number]),
            int(sums[1][number]),
            (box.y + int(rows[number]), box.x + int(columns[number])),
        )
        for number, polygon in enumerate(polygons, 1)
    )
    edges = Edges(labels[0].copy(), labels[-1].copy(), labels[:, 0].copy(), labels[:, -1].copy())
    return CoreObjects(box, pieces, edges)


def without_small(mask: Mask, found: CoreObjects, least: float) -> tuple[Mask, CoreObjects]:
    """Take objects of less than `least` px out of a core, of those that cannot go on in its neighbors.

    Args:
        mask: (H, W) bool, of the core.
        found: Its objects.
        least: px.

    Returns:
        The mask and the objects that are left.
    """
    small = [piece for piece in found.closed() if piece.size < least]
    if not small:
        return mask, found
    mask = mask.copy()
    for piece in small:
        paint(mask, piece.polygon, found.box.x, found.box.y, False)
    gone = {piece.label for piece in small}
    pieces = tuple(piece for piece in found.pieces if piece.label not in gone)
    return mask, CoreObjects(found.box, pieces, found.edges if pieces else None)


def paint(mask: Mask, polygon: Polygon | MultiPolygon, x: int, y: int, value: bool) -> None:
    """Set the px of a polygon in a mask that begins at (x, y), in place."""
    for part in getattr(polygon, "geoms", [polygon]):
        left, top, right, bottom = (int(side) for side in part.bounds)
        rows = slice(max(top - y, 0), max(bottom - y, 0))
        columns = slice(max(left - x, 0), max(right - x, 0))
        window = mask[rows, columns]
        inside = np.zeros(window.shape, bool)
        if inside.size:
            fill(inside, list(rings_of(part)), x + columns.start, y + rows.start, 1)
            window[inside] = value


def eccentricity(polygon: Polygon | MultiPolygon) -> float:
    """Return the eccentricity (0 circle .. 1 line) of the ellipse with the polygon's second moments."""
    xx = xy = yy = 0.0
    center = shapely.centroid(polygon)
    for part in getattr(polygon, "geoms", [polygon]):
        for ring, sign in [(part.exterior, 1.0), *((hole, -1.0) for hole in part.interiors)]:
            points = np.asarray(ring.coords) - (center.x, center.y)
            (x0, y0), (x1, y1) = points[:-1].T, points[1:].T
            cross = x0 * y1 - x1 * y0  # Green's theorem
            cross *= sign * (1.0 if cross.sum() >= 0 else -1.0)
            xx += ((x0 * x0 + x0 * x1 + x1 * x1) * cross).sum() / 12
            yy += ((y0 * y0 + y0 * y1 + y1 * y1) * cross).sum() / 12
            xy += ((x0 * y1 + 2 * x0 * y0 + 2 * x1 * y1 + x1 * y0) * cross).sum() / 24
    least, most = np.linalg.eigvalsh([[xx, xy], [xy, yy]])
    return float(np.sqrt(max(0.0, 1 - least / most))) if most > 0 else 0.0
