"""The pieces of objects, as cores cut them, joined to the objects of a slide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import shapely

from apacs_ray.evaluation.objects import Labels
from apacs_ray.inference.holes import filled, holes_of, inside
from apacs_ray.inference.objects import CoreObjects, Piece, SlideObject
from apacs_ray.inference.outlines import joined


def join(cores: Iterable[CoreObjects], width: int, fill: float = 0) -> Iterator[SlideObject]:
    """Join the pieces of a slide's cores.

    Objects that may still go on below are held, and those that may lie in a hole of these which will be filled:
    memory grows with the slide's width, not its height.

    Args:
        cores: In reading order; those without pieces may be left out.
        width: Of the slide, px.
        fill: Holes of less px are filled; what lies in them is no object of its own.

    Yields:
        Every object once: those that end in a row of cores by their first pixels, row after row.
    """
    open_objects = _Joining(width, fill)
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
    fill: float
    _parents: dict[int, int] = field(default_factory=dict)
    _pieces: dict[int, list[Piece]] = field(default_factory=dict)  # by root
    _members: dict[int, list[int]] = field(default_factory=dict)  # keys of each root
    _waiting: list[SlideObject] = field(default_factory=list)  # that may lie in a hole of one that goes on
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
        yield from self._settled(self._end([root for root in self._pieces if root not in going_on]))

    def finish(self) -> Iterator[SlideObject]:
        """Yield what is left at the slide's lower end."""
        yield from self._settled(self._end(list(self._pieces)))

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
        """Objects of which nothing more can come."""
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
                    sum(piece.filled for piece in pieces),
                )
            )
        return ended

    def _settled(self, ended: list[SlideObject]) -> list[SlideObject]:
        """Objects that ended, less those that wait, and those that waited and need not any more."""
        if self.fill:
            ended = self._filled(ended)
            small = [place for place, one in enumerate(ended) if one.size < self.fill]
            boxes = [self._reach(pieces) for pieces in self._pieces.values()]
            shapes = np.array([ended[place].polygon for place in small], object)
            held = {small[number] for number in shapely.STRtree(boxes).query(shapes, predicate="covered_by")[0]}
            self._waiting = [ended[place] for place in sorted(held)]
            ended = [one for place, one in enumerate(ended) if place not in held]
        return sorted(ended, key=lambda one: one.first)

    def _filled(self, ended: list[SlideObject]) -> list[SlideObject]:
        """What ended and what waited, less what lies in holes that were filled here."""
        every = [*self._waiting, *ended]
        tree = shapely.STRtree([one.polygon for one in every])
        gone: set[int] = set()
        for place, one in enumerate(every):
            if place >= len(self._waiting) and (holes := holes_of(one.polygon, self.fill)):
                gone |= inside(holes, tree)
                every[place] = replace(filled(one, holes), holes=tuple(holes))
        return [one for place, one in enumerate(every) if place not in gone]

    def _reach(self, pieces: Sequence[Piece]) -> shapely.Polygon:
        """The box in which holes of an object that goes on can lie, down to the last row of cores."""
        left, top, right, _ = shapely.total_bounds([piece.polygon for piece in pieces])
        return shapely.box(left, top, right, self._foot)


def _keys(labels: Labels, base: int) -> npt.NDArray[np.int64]:
    return np.where(labels > 0, labels.astype(np.int64) + base, 0)
