"""The interface of an open slide, whichever engine reads it.

Pixels are 8-bit RGB as stored, without color management; what a slide does not hold is its background color.
`slides.open` chooses the engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from apacs_ray.data.grid import Box
from apacs_ray.data.images import Mask, Rgb

Engine = Literal["auto", "vips", "openslide"]
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Level:
    """One level of the pyramid. `downsample` is level-0 px per px of this level."""

    width: int
    height: int
    downsample: float


@dataclass(frozen=True)
class SlideInfo:
    """The properties of a slide, as its file states them.

    Attributes:
        engine: that reads it.
        levels: of the pyramid, the largest first.
        mpp: um per level-0 px, None where unknown.
        bounds: the part that was scanned, level-0 px.
        background: RGB of what the slide does not hold, 0..255.
        notes: what a person should know of how it is read.
    """

    engine: str
    levels: tuple[Level, ...]
    mpp: float | None
    bounds: Box
    background: tuple[int, int, int] = WHITE
    notes: tuple[str, ...] = ()

    @property
    def width(self) -> int:
        """Width of level 0, px."""
        return self.levels[0].width

    @property
    def height(self) -> int:
        """Height of level 0, px."""
        return self.levels[0].height

    def level_for(self, downsample: float) -> int:
        """Return the number of the smallest level that still holds every pixel wanted at `downsample`."""
        fitting = [number for number, level in enumerate(self.levels) if level.downsample <= downsample * 1.001]
        return max(fitting, key=lambda number: self.levels[number].downsample, default=0)


class Slide(Protocol):
    """An open slide. Not safe for threads; close it."""

    info: SlideInfo

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Rgb:
        """Return a region of a level; outside of the level is background.

        Args:
            level: its number.
            x: left edge, px of that level.
            y: top edge, px of that level.
            width: px of that level.
            height: px of that level.

        Returns:
            (height, width, 3) uint8 RGB.

        Raises:
            BadInput: unreadable_region; the file is damaged there. Reading elsewhere goes on.
        """
        ...

    def read_image(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        """Return the same as a picture of Pillow's (RGB), without a copy where the engine has one."""
        ...

    def close(self) -> None:
        """Close the slide's files."""
        ...


@runtime_checkable
class KnowsHoles(Protocol):
    """A slide that can tell what it holds from what it fills in: what was not scanned is unknown, not bright."""

    def read_known(self, level: int, x: int, y: int, width: int, height: int) -> tuple[Rgb, Mask]:
        """Return the region as `Slide.read`, and (height, width) bool: True where the slide holds the pixel."""
        ...


def level_downsample(full: tuple[int, int], level: tuple[int, int]) -> float:
    """Return the level-0 px per px of a level: the integer that its sides were cut from, if one fits.

    Sides are cut to whole px, up or down, so a short side says little: 507 px halved four times are 31, not 31.69.

    Args:
        full: (width, height) of level 0, px.
        level: (width, height) of the level, px.

    Returns:
        Level-0 px per px.
    """
    pairs = list(zip(full, level, strict=True))
    least = max(whole / (part + 1) for whole, part in pairs)
    most = min(whole / (part - 1) if part > 1 else float(whole) for whole, part in pairs)
    long = max((whole, whole / part) for whole, part in pairs)[1]
    fitting = range(math.floor(least) + 1, math.ceil(most))
    powers = [1 << n for n in range(32) if 1 << n in fitting]  # scanners halve levels
    nearest = min(fitting, key=lambda n: abs(n - long), default=long)
    return float(min(powers, key=lambda n: abs(n - long), default=nearest))


def read_box(slide: Slide, box: Box, downsample: float, width: int, height: int) -> Image.Image:
    """Read a tile at any scale: `read_rectangle` from the whole px at which its row says that it begins.

    Args:
        slide: open.
        box: of which `x` and `y` count: where the tile begins, level-0 px.
        downsample: level-0 px per tile px.
        width: tile px.
        height: tile px.

    Returns:
        The tile as an RGB picture.
    """
    return read_rectangle(slide, box.x, box.y, downsample, width, height)


def read_rectangle(slide: Slide, x: float, y: float, downsample: float, width: int, height: int) -> Image.Image:
    """Read a rectangle at any scale and place.

    The nearest finer level is read. Where it is not at this scale already, it is resampled by Pillow's Lanczos filter
    with its support widened to the scale (so nothing aliases), on the exact, fractional source rectangle, and with the
    pixels around it, so that neighbors fit.

    Args:
        slide: open.
        x: left edge, level-0 px.
        y: top edge, level-0 px.
        downsample: level-0 px per px of the picture.
        width: px of the picture.
        height: px of the picture.

    Returns:
        The rectangle as an RGB picture.
    """
    info = slide.info
    number = info.level_for(downsample)
    level = info.levels[number]
    scale = downsample / level.downsample  # px of the level per px of the picture
    left, top = x / level.downsample, y / level.downsample
    if abs(scale - 1) < 1e-6 and abs(left - round(left)) < 1e-3 and abs(top - round(top)) < 1e-3:
        return slide.read_image(number, round(left), round(top), width, height)
    margin = math.ceil(3 * max(scale, 1.0)) + 1  # Lanczos reaches three px of the picture
    # only px within the slide: the background outside would tint its edge
    right, bottom = min(left + width * scale, level.width), min(top + height * scale, level.height)
    begin, head = max(math.floor(left) - margin, 0), max(math.floor(top) - margin, 0)
    end, foot = min(math.ceil(right) + margin, level.width), min(math.ceil(bottom) + margin, level.height)
    source = slide.read_image(number, begin, head, end - begin, foot - head)
    within = (left - begin, top - head, right - begin, bottom - head)
    return source.resize((width, height), Image.Resampling.LANCZOS, box=within)


def filled(info: SlideInfo, width: int, height: int) -> Rgb:
    """Return (height, width, 3) uint8 of the slide's background color."""
    rgb = np.empty((height, width, 3), np.uint8)
    rgb[:] = info.background
    return rgb
