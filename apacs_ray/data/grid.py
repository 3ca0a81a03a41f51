"""The grid of tiles over an image, and which pixels of a tile no other tile counts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

LastTile = Literal["keep", "shift", "drop"]


@dataclass(frozen=True)
class Box:
    """A rectangle of an image, px; the image's corner is (0, 0)."""

    x: int
    y: int
    width: int
    height: int

    def grown(self, margin: int) -> Box:
        """Return the box with `margin` px more on every side, beyond the image's edges too."""
        return Box(self.x - margin, self.y - margin, self.width + 2 * margin, self.height + 2 * margin)


def grid(width: int, height: int, size: int, stride: int, last: LastTile) -> list[Box]:
    """Lay tiles over an image of `width` x `height` px.

    Args:
        width: of the image, px.
        height: of the image, px.
        size: side of a tile, px. An axis that is not longer than this has one tile of the image's length.
        stride: px between the beginnings of neighboring tiles, at most `size`.
        last: what becomes of the tile that reaches the end of an axis: it is cut there (keep), moved back to full size
            (shift) or, unless it fits, left out (drop).

    Returns:
        The tiles in reading order.
    """
    columns, rows = _axis(width, size, stride, last), _axis(height, size, stride, last)
    return [Box(x, y, right - x, bottom - y) for y, bottom in rows for x, right in columns]


def owned_region(
    x: int, y: int, width: int, height: int, size: int, stride: int, last: LastTile
) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom), tile px, of the part of the tile at (x, y) that no other tile counts.

    Overlaps are cut in their middle, so that a pixel is judged where it lies far from a tile's edge; over a grid the
    regions hold each covered pixel exactly once.

    Args:
        x: left edge of a tile of the grid, px.
        y: top edge of that tile, px.
        width: as in `grid`.
        height: as in `grid`.
        size: as in `grid`.
        stride: as in `grid`.
        last: as in `grid`.

    Returns:
        The region, tile px; `right` and `bottom` are the first px after it.
    """
    left, right = _owned(x, _axis(width, size, stride, last))
    top, bottom = _owned(y, _axis(height, size, stride, last))
    return left, top, right, bottom


@lru_cache(maxsize=64)
def _axis(length: int, size: int, stride: int, last: LastTile) -> tuple[tuple[int, int], ...]:
    """Return where the tiles along one axis begin and end."""
    if length <= size:
        return ((0, length),)
    full = (length - size) // stride + 1
    spans = [(number * stride, number * stride + size) for number in range(full)]
    if spans[-1][1] < length and last != "drop":
        spans.append((full * stride if last == "keep" else length - size, length))
    return tuple(spans)


def _owned(start: int, spans: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Return the part of the span beginning at `start`, relative to it, that no neighbor counts."""
    number = [begin for begin, _ in spans].index(start)
    begin, end = spans[number]
    if number > 0:
        begin = (begin + spans[number - 1][1]) // 2
    if number + 1 < len(spans):
        end = (spans[number + 1][0] + end) // 2
    return begin - start, end - start
