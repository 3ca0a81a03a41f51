"""A small picture of a whole slide, on which tissue is looked for: a level of it, averaged and read in parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from apacs_ray.data.grid import Box
from apacs_ray.data.images import Mask, Rgb
from apacs_ray.errors import BadInput
from apacs_ray.slides.reader import KnowsHoles, Slide

UM_PER_PIXEL = 8.0  # a cell is a few px, and 200 000 x 100 000 px of 0.25 um are 20 Mpx
COARSEST = 1.4  # a level may be coarser than UM_PER_PIXEL by this factor, else a finer one is read
STRIP = 4096  # px, side of the squares in which a level is read
SMALLEST = 128  # px, least side of the parts that are tried one by one around damage
MAX_LOST = 2000  # such parts that cannot be read, before the slide is refused
UNREAD = 128  # gray level of what cannot be read


@dataclass(frozen=True)
class SmallPicture:
    """A level averaged over squares of its px.

    Attributes:
        picture: (H, W, 3) uint8 RGB.
        outside: (H, W) bool, True where nothing was scanned.
        damaged: (H, W) bool, True where it cannot be read.
    """

    picture: Rgb
    outside: Mask
    damaged: Mask


def level_to_read(slide: Slide, mpp: float) -> tuple[int, int]:
    """Choose the coarsest level that still shows cells.

    A level that is somewhat too coarse is taken as it is: the next finer one may be the whole slide.

    Args:
        slide: open.
        mpp: um per level-0 px.

    Returns:
        The number of the level, and by how much it is shrunk further.
    """
    wanted = UM_PER_PIXEL / mpp
    number = slide.info.level_for(max(wanted * COARSEST, 1.0))
    return number, max(1, round(wanted / slide.info.levels[number].downsample))


def read_small(slide: Slide, number: int, shrink: int) -> SmallPicture:
    """Read a whole level, averaged over `shrink` x `shrink` px, in parts, so that memory stays flat.

    Args:
        slide: open.
        number: of the level.
        shrink: px of the level per px of the picture, a side.

    Returns:
        The picture.

    Raises:
        BadInput: no part of it can be read, or too many parts cannot.
    """
    level = slide.info.levels[number]
    height, width = -(-level.height // shrink), -(-level.width // shrink)
    picture = np.full((height, width, 3), UNREAD, np.uint8)
    outside, damaged = np.zeros((2, height, width), bool)
    for box, part in _parts(slide, number, shrink):
        rows = slice(box.y // shrink, (box.y + box.height - 1) // shrink + 1)
        place = rows, slice(box.x // shrink, (box.x + box.width - 1) // shrink + 1)
        if part is None:
            damaged[place] = True
            continue
        rgb, known = part
        picture[place] = np.asarray(Image.fromarray(rgb).reduce(shrink))
        if not known.all():
            outside[place] = np.asarray(Image.fromarray((~known).astype(np.uint8) * 255).reduce(shrink)) > 0
    return SmallPicture(picture, outside, damaged)


def _parts(slide: Slide, number: int, shrink: int) -> Iterator[tuple[Box, tuple[Rgb, Mask] | None]]:
    """Yield a level in squares of `STRIP` px; around damage in smaller ones, of which the smallest are None."""
    level = slide.info.levels[number]
    strip = max(1, STRIP // shrink) * shrink
    squares = [
        Box(left, top, min(strip, level.width - left), min(strip, level.height - top))
        for top in range(0, level.height, strip)
        for left in range(0, level.width, strip)
    ]
    squares.reverse()
    lost, read = 0, False
    while squares:
        box = squares.pop()
        try:
            part = _read(slide, number, box)
        except BadInput as defect:
            smaller = _quarters(box, shrink)
            if smaller:
                squares += smaller
                continue
            lost += 1
            if lost > MAX_LOST or (not squares and not read):
                raise BadInput(defect.code, f"most of it cannot be read: {defect.reason}") from defect
            yield box, None
        else:
            read = True
            yield box, part


def _read(slide: Slide, number: int, box: Box) -> tuple[Rgb, Mask]:
    """Read a part of a level, and what of it the slide holds: all, where it cannot tell."""
    place = box.x, box.y, box.width, box.height
    if isinstance(slide, KnowsHoles):
        return slide.read_known(number, *place)
    return slide.read(number, *place), np.ones((box.height, box.width), bool)


def _quarters(box: Box, shrink: int) -> list[Box]:
    """Split a square into smaller ones, which begin at multiples of `shrink`; none where it is small already."""
    half = max(box.width, box.height) // 2 // shrink * shrink
    if half < SMALLEST:
        return []
    return [
        Box(box.x + x, box.y + y, min(half, box.width - x), min(half, box.height - y))
        for y in range(0, box.height, half)
        for x in range(0, box.width, half)
    ]
