"""Objects of a mask that is made core by core: what each core holds of them, and the same objects joined over cores.

Cells that touch are one object, as in evaluation. A core gives `Piece`s, polygons in px of the slide, with sums of
whole numbers: joined in any order they give the same object, however the slide was cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry import MultiPolygon, Polygon

from apacs_ray.data.grid import Box
from apacs_ray.data.images import Mask
from apacs_ray.evaluation.objects import Labels, components
from apacs_ray.inference.outlines import joined, outlines
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
        pixels: How many it has.
        probability: Sum over its pixels, in 1 / `STEPS`.
        disagreement: Likewise.
        first: (row, column) of its first pixel in reading order, px of the slide.
    """

    label: int
    polygon: Polygon | MultiPolygon
    pixels: int
    probability: int
    disagreement: int
    first: tuple[int, int]


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


@dataclass(frozen=True)
class SlideObject:
    """One object of a slide; as `Piece`, with everything that belongs to it."""

    polygon: Polygon | MultiPolygon
    pixels: int
    probability: int
    disagreement: int
    first: tuple[int, int]


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
    edges = found.edges
    if edges is None:
        return mask, found
    open_labels = set(np.unique(np.concatenate([edges.top, edges.bottom, edges.left, edges.right])).tolist())
    small = [piece for piece in found.pieces if piece.pixels < least and piece.label not in open_labels]
    if not small:
        return mask, found
    mask = mask.copy()
    for piece in small:
        erase(mask, piece.polygon, found.box.x, found.box.y)
    gone = {piece.label for piece in small}
    pieces = tuple(piece for piece in found.pieces if piece.label not in gone)
    return mask, CoreObjects(found.box, pieces, edges if pieces else None)


def erase(mask: Mask, polygon: Polygon | MultiPolygon, x: int, y: int) -> None:
    """Set the px of a polygon in a mask that begins at (x, y) to background, in place."""
    for part in getattr(polygon, "geoms", [polygon]):
        left, top, right, bottom = (int(side) for side in part.bounds)
        rows = slice(max(top - y, 0), max(bottom - y, 0))
        columns = slice(max(left - x, 0), max(right - x, 0))
        window = mask[rows, columns]
        inside = np.zeros(window.shape, bool)
        if inside.size:
            fill(inside, list(rings_of(part)), x + columns.start, y + rows.start, 1)
            window[inside] = False


def join(cores: Iterable[CoreObjects], width: int) -> Iterator[SlideObject]:
    """Join the pieces of a slide's cores.

    Objects that may still go on below are held, and no others: memory grows with the slide's width, not its height.

    Args:
        cores: In reading order; those without pieces may be left out.
        width: Of the slide, px.

    Yields:
        Every object once: those that end in a row of cores by their first pixels, row after row.
    """
    open_objects = _Joining(width)
    row: list[CoreObjects] = []
    for core in cores:
        if row and core.box.y != row[0].box.y:
            yield from open_objects.take(row)
            row = []
        row.append(core)
    if row:
        yield from open_objects.take(row)
    yield from open_objects.finish()


@dataclass
class _Joining:
    """Objects that reach the lower side of the last row of cores."""

    width: int
    _parents: dict[int, int] = field(default_factory=dict)
    _pieces: dict[int, list[Piece]] = field(default_factory=dict)  # by root
    _members: dict[int, list[int]] = field(default_factory=dict)  # keys of each root
    _frontier: npt.NDArray[np.int64] | None = None  # keys along the lower side, 0 for background
    _foot: int = 0  # px where that side lies
    _next: int = 1

    def take(self, row: Sequence[CoreObjects]) -> Iterator[SlideObject]:
        """Add a row of cores, and yield the objects that end there."""
        top, bottom = np.zeros(self.width, np.int64), np.zeros(self.width, np.int64)
        before: tuple[int, npt.NDArray[np.int64]] | None = None  # where the last core ended, and its right side
        for core in row:
            if core.edges is None:
                continue
            base = self._next - 1
            for piece in core.pieces:
                self._add(base + piece.label, piece)
            columns = slice(core.box.x, core.box.x + core.box.width)
            top[columns], bottom[columns] = _keys(core.edges.top, base), _keys(core.edges.bottom, base)
            if before is not None and before[0] == core.box.x:
                self._touch(before[1], _keys(core.edges.left, base))
            before = core.box.x + core.box.width, _keys(core.edges.right, base)
        box = row[0].box
        if self._frontier is not None and self._foot == box.y:
            self._touch(self._frontier, top)
        self._frontier, self._foot = bottom, box.y + box.height
        going_on = {self._root(int(key)) for key in np.unique(bottom) if key}
        yield from self._end([root for root in self._pieces if root not in going_on])

    def finish(self) -> Iterator[SlideObject]:
        """Yield what is left at the slide's lower end."""
        yield from self._end(list(self._pieces))

    def _add(self, key: int, piece: Piece) -> None:
        self._parents[key] = key
        self._pieces[key], self._members[key] = [piece], [key]
        self._next = key + 1

    def _touch(self, one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> None:
        """Unite what meets across a line: px at the same place, or one px further to either side."""
        length = len(one)
        for shift in (-1, 0, 1):
            mine = one[max(shift, 0) : length + min(shift, 0)]
            theirs = other[max(-shift, 0) : length + min(-shift, 0)]
            both = (mine > 0) & (theirs > 0)
            for a, b in np.unique(np.stack([mine[both], theirs[both]], axis=1), axis=0).tolist():
                self._unite(a, b)

    def _unite(self, a: int, b: int) -> None:
        keep, gone = sorted((self._root(a), self._root(b)))
        if keep == gone:
            return
        if len(self._members[gone]) > len(self._members[keep]):
            keep, gone = gone, keep
        self._parents[gone] = keep
        self._pieces[keep] += self._pieces.pop(gone)
        self._members[keep] += self._members.pop(gone)

    def _root(self, key: int) -> int:
        while self._parents[key] != key:
            self._parents[key] = self._parents[self._parents[key]]
            key = self._parents[key]
        return key

    def _end(self, roots: list[int]) -> list[SlideObject]:
        ended = []
        for root in roots:
            pieces = self._pieces.pop(root)
            for key in self._members.pop(root):
                del self._parents[key]
            ended.append(
                SlideObject(
                    joined([piece.polygon for piece in pieces]),
                    sum(piece.pixels for piece in pieces),
                    sum(piece.probability for piece in pieces),
                    sum(piece.disagreement for piece in pieces),
                    min(piece.first for piece in pieces),
                )
            )
        return sorted(ended, key=lambda one: one.first)


def _keys(labels: Labels, base: int) -> npt.NDArray[np.int64]:
    return np.where(labels > 0, labels.astype(np.int64) + base, 0)


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
