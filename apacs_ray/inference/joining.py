"""The pieces of objects, as cores cut them, joined to the objects of a slide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import shapely

from apacs_ray.data.grid import Box
from apacs_ray.evaluation.objects import Labels
from apacs_ray.inference.holes import filled, holes_of, inside
from apacs_ray.inference.objects import CoreObjects, Piece, SlideObject
from apacs_ray.inference.outlines import joined

Keys = npt.NDArray[np.int64]


def join(cores: Iterable[CoreObjects], width: int, fill: float = 0) -> Iterator[SlideObject]:
    """Join the pieces of a slide's cores.

    What ends within a core is yielded with it. Objects that may go on are held, and those that may lie in a hole of
    these which will be filled: memory grows with what lies on the borders of a row of cores, not with the slide.

    Args:
        cores: In reading order; those without pieces may be left out.
        width: Of the slide, px.
        fill: Holes of less px are filled; what lies in them is no object of its own.

    Yields:
        Every object once: those that lie within a core, core after core, and behind each row of cores those that end
        there on borders; of each the first pixels in reading order.
    """
    open_objects = _Joining(width, fill)
    for core in cores:
        if open_objects.row is not None and core.box.y != open_objects.row.y:
            yield from open_objects.end_row()
        yield from open_objects.add(core)
    if open_objects.row is not None:
        yield from open_objects.end_row()
    yield from open_objects.finish()


@dataclass
class _Joining:
    """Objects that touch borders of the cores so far, and may go on; `row` is where the current row began."""

    width: int
    fill: float
    row: Box | None = None
    _parents: dict[int, int] = field(default_factory=dict)
    _pieces: dict[int, list[Piece]] = field(default_factory=dict)  # by root
    _members: dict[int, list[int]] = field(default_factory=dict)  # keys of each root
    _waiting: list[SlideObject] = field(default_factory=list)  # that may lie in a hole of one that goes on
    _frontier: Keys | None = None  # keys along the lower side of the last row, 0 for background
    _foot: int = 0  # px where that side lies
    _sides: tuple[Keys, Keys] | None = None  # keys along the upper and lower side of this row
    _before: tuple[int, Keys] | None = None  # where the last core ended, and the keys along its right side
    _next: int = 1

    def add(self, core: CoreObjects) -> list[SlideObject]:
        """Add a core, and return the objects that it holds whole, but for those that a hole may hold."""
        if self.row is None or self._sides is None:
            self.row, self._before = core.box, None
            self._sides = np.zeros(self.width, np.int64), np.zeros(self.width, np.int64)
        if core.edges is None:
            return []
        base, box, (top, bottom) = self._next - 1, core.box, self._sides
        # a hole that is filled is smaller than these
        whole = {piece.label: piece for piece in core.closed() if piece.size >= self.fill}
        for piece in core.pieces:
            if piece.label not in whole:
                self._add(base + piece.label, piece)
        self._next = base + core.pieces[-1].label + 1
        columns = slice(box.x, box.x + box.width)
        top[columns], bottom[columns] = _keys(core.edges.top, base), _keys(core.edges.bottom, base)
        if self._before is not None and self._before[0] == box.x:
            self._touch(self._before[1], _keys(core.edges.left, base))
        self._before = box.x + box.width, _keys(core.edges.right, base)
        return sorted((_object_of([piece]) for piece in whole.values()), key=lambda one: one.first)

    def end_row(self) -> Iterator[SlideObject]:
        """End a row of cores, and yield the objects of which nothing more can come."""
        assert self.row is not None
        assert self._sides is not None
        top, bottom = self._sides
        if self._frontier is not None and self._foot == self.row.y:
            self._touch(self._frontier, top)
        self._frontier, self._foot = bottom, self.row.y + self.row.height
        self.row = self._sides = None
        going_on = {self._root(int(key)) for key in np.unique(bottom) if key}
        yield from self._settled(self._end([root for root in self._pieces if root not in going_on]))

    def finish(self) -> Iterator[SlideObject]:
        """Yield what is left at the slide's lower end."""
        yield from self._settled(self._end(list(self._pieces)))

    def _add(self, key: int, piece: Piece) -> None:
        self._parents[key] = key
        self._pieces[key], self._members[key] = [piece], [key]

    def _touch(self, one: Keys, other: Keys) -> None:
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
            ended.append(_object_of(pieces))
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


def _object_of(pieces: Sequence[Piece]) -> SlideObject:
    """The object that pieces make up."""
    return SlideObject(
        joined([piece.polygon for piece in pieces]),
        sum(piece.pixels for piece in pieces),
        sum(piece.probability for piece in pieces),
        sum(piece.disagreement for piece in pieces),
        min(piece.first for piece in pieces),
        sum(piece.filled for piece in pieces),
    )


def _keys(labels: Labels, base: int) -> Keys:
    return np.where(labels > 0, labels.astype(np.int64) + base, 0)
