"""Tiles (FOVs): the grid over an image, which pixels of a tile count, tile names, and the row of a shard."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import pyarrow as pa

LastTile = Literal["keep", "shift", "drop"]

TILE_SCHEMA = pa.schema(
    [
        pa.field("tile_id", pa.string(), nullable=False),
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("x", pa.int64(), nullable=False),  # left edge, level-0 px
        pa.field("y", pa.int64(), nullable=False),  # top edge, level-0 px
        pa.field("level", pa.int32(), nullable=False),
        pa.field("downsample", pa.float64(), nullable=False),  # level-0 px per tile px
        pa.field("mpp", pa.float64()),  # um per tile px, null where unknown
        pa.field("width", pa.int32(), nullable=False),  # tile px
        pa.field("height", pa.int32(), nullable=False),
        pa.field("once_left", pa.int32(), nullable=False),  # tile px, `once_region`
        pa.field("once_top", pa.int32(), nullable=False),
        pa.field("once_right", pa.int32(), nullable=False),
        pa.field("once_bottom", pa.int32(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # encoded 8-bit sRGB
        pa.field("image_format", pa.string(), nullable=False),  # jpeg, png or webp
        pa.field("mask", pa.binary()),  # 1-bit PNG, null where not annotated
        pa.field("mask_fraction", pa.float64()),  # 0..1, share of cell pixels
        pa.field("tissue_fraction", pa.float64(), nullable=False),  # 0..1
        pa.field("focus", pa.float64(), nullable=False),  # gray levels squared
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("source_version", pa.string(), nullable=False),
    ]
)

_UNSAFE = re.compile(r"[^\w.-]")


@dataclass(frozen=True)
class Box:
    """A rectangle of an image, px; the image's corner is (0, 0)."""

    x: int
    y: int
    width: int
    height: int

    def grown(self, margin: int) -> Box:
        """The box with `margin` px more on every side, beyond the image's edges too."""
        return Box(self.x - margin, self.y - margin, self.width + 2 * margin, self.height + 2 * margin)


def grid(width: int, height: int, size: int, stride: int, last: LastTile) -> list[Box]:
    """The tiles of an image of `width` x `height` px, in reading order; `stride` <= `size`.

    Along each axis: where the image is not longer than `size`, one tile of the image's length. Else tiles
    begin every `stride` px up to the first that reaches the end, and that one is cut there (keep), moved back
    to full size (shift) or, unless it fits, left out (drop).
    """
    columns, rows = _axis(width, size, stride, last), _axis(height, size, stride, last)
    return [Box(x, y, right - x, bottom - y) for y, bottom in rows for x, right in columns]


def once_region(
    x: int, y: int, width: int, height: int, size: int, stride: int, last: LastTile
) -> tuple[int, int, int, int]:
    """(left, top, right, bottom), tile px, of the part of the tile at (x, y) that no other tile counts.

    The arguments after `y` are those of `grid`. Overlaps are cut in their middle, so that a pixel is judged
    where it lies far from a tile's edge; over a grid the regions hold each covered pixel exactly once.
    """
    left, right = _once(x, _axis(width, size, stride, last))
    top, bottom = _once(y, _axis(height, size, stride, last))
    return left, top, right, bottom


def tile_id(source: str, x: int, y: int) -> str:
    """`SOURCE_X_Y`: the same for the same place, and different for a different place or `source`.

    `source` names one image of the run (`Pair.image_id`); a slide id will do only where a slide is one image.
    The id can be a file name: '/' becomes '~', and what is no letter, digit, '.', '-' or '_' is
    percent-encoded.
    """
    name = _UNSAFE.sub(_escape, source)
    return f"{name}_{x}_{y}"


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    return "~" if character == "/" else "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


@lru_cache(maxsize=64)
def _axis(length: int, size: int, stride: int, last: LastTile) -> tuple[tuple[int, int], ...]:
    """Begin and end of the tiles along one axis."""
    if length <= size:
        return ((0, length),)
    full = (length - size) // stride + 1
    spans = [(number * stride, number * stride + size) for number in range(full)]
    if spans[-1][1] < length and last != "drop":
        spans.append((full * stride if last == "keep" else length - size, length))
    return tuple(spans)


def _once(start: int, spans: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The part of the span beginning at `start`, relative to it, that no neighbor counts."""
    number = [begin for begin, _ in spans].index(start)
    begin, end = spans[number]
    if number > 0:
        begin = (begin + spans[number - 1][1]) // 2
    if number + 1 < len(spans):
        end = (spans[number + 1][0] + end) // 2
    return begin - start, end - start
