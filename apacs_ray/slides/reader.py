"""What a whole slide is, whichever engine reads it, and which engine that is.

libvips reads TIFF pyramids fastest; OpenSlide reads what the scanners' vendors invented. Pixels are 8-bit RGB as
stored, without colour management; what a slide does not hold is its background colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from apacs_ray.data.tiles import Box
from apacs_ray.errors import BadInput

Rgb = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Engine = Literal["auto", "vips", "openslide"]
LARGEST_SIDE, LARGEST_AREA = 2_000_000, 2e11  # px; of a quarter of a micron: half a metre, and 125 square centimetres
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Level:
    """One level of the pyramid. `downsample` is level-0 px per px of this level."""

    width: int
    height: int
    downsample: float


@dataclass(frozen=True)
class SlideInfo:
    """What a slide says of itself. `bounds` is the part that was scanned, level-0 px; `mpp` um per level-0 px."""

    engine: str
    levels: tuple[Level, ...]
    mpp: float | None
    bounds: Box
    background: tuple[int, int, int] = WHITE

    @property
    def width(self) -> int:
        return self.levels[0].width

    @property
    def height(self) -> int:
        return self.levels[0].height

    def level_for(self, downsample: float) -> int:
        """The smallest level that still holds every pixel wanted at `downsample`."""
        fitting = [number for number, level in enumerate(self.levels) if level.downsample <= downsample * 1.001]
        return max(fitting, key=lambda number: self.levels[number].downsample, default=0)


class Slide(Protocol):
    """An open slide. Not safe for threads; close it."""

    info: SlideInfo

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Rgb:
        """(height, width, 3) uint8 from level `level`, all in that level's px; outside is background.

        Raises BadInput (unreadable_region) when the file is damaged there; reading elsewhere goes on.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class KnowsHoles(Protocol):
    """A slide that can tell what it holds from what it fills in: what was not scanned is unknown, not bright."""

    def read_known(self, level: int, x: int, y: int, width: int, height: int) -> tuple[Rgb, Mask]:
        """As `Slide.read`, and (height, width) bool: True where the slide holds the pixel."""
        ...


def open_slide(path: Path, engine: Engine = "auto") -> Slide:
    """Open a slide with the engine that can read it.

    Raises BadInput: missing_file, empty_file, unreadable, truncated, unsupported_slide, too_large.

    `auto` takes libvips for tiled TIFF whose compression it decodes, and OpenSlide for everything else.
    """
    slide = _opened(path, engine)
    for level in slide.info.levels:
        sides = level.width, level.height
        if min(sides) < 1 or max(sides) > LARGEST_SIDE or level.width * level.height > LARGEST_AREA:
            slide.close()
            raise BadInput("too_large", f"{path.name}: a level of {level.width} x {level.height} px, as no slide has")
    return slide


def _opened(path: Path, engine: Engine) -> Slide:
    from apacs_ray.slides.openslide_engine import OpenSlideSlide
    from apacs_ray.slides.vips_engine import VipsSlide, tiff_levels

    if not path.is_file():
        raise BadInput("missing_file", f"{path.name}: no such file")
    if path.stat().st_size == 0:
        raise BadInput("empty_file", f"{path.name} has no bytes")
    pages = tiff_levels(path) if engine != "openslide" else None
    if pages is not None:
        return VipsSlide(path, pages)
    if engine == "vips":
        raise BadInput("unsupported_slide", f"{path.name}: no tiled TIFF that libvips decodes (data.engine auto may)")
    return OpenSlideSlide(path)


def read_box(slide: Slide, box: Box, downsample: float, width: int, height: int) -> Rgb:
    """(height, width, 3) of a tile that begins at level-0 px (box.x, box.y) and has `downsample` level-0 px a pixel.

    The nearest finer level is read. Where it is not at this scale already, it is resampled by Pillow's Lanczos
    filter with its support widened to the scale (so nothing aliases), on the exact, fractional source rectangle, and
    with the pixels around the tile, so that neighbouring tiles fit.
    """
    info = slide.info
    number = info.level_for(downsample)
    level = info.levels[number]
    scale = downsample / level.downsample  # px of the level per px of the tile
    left, top = box.x / level.downsample, box.y / level.downsample
    if abs(scale - 1) < 1e-6 and abs(left - round(left)) < 1e-3 and abs(top - round(top)) < 1e-3:
        return slide.read(number, round(left), round(top), width, height)
    from PIL import Image

    margin = int(np.ceil(3 * max(scale, 1.0))) + 1  # Lanczos looks three pixels of the tile far
    x, y = int(np.floor(left)) - margin, int(np.floor(top)) - margin
    right, bottom = left + width * scale, top + height * scale
    source = slide.read(number, x, y, int(np.ceil(right)) + margin - x, int(np.ceil(bottom)) + margin - y)
    rectangle = (left - x, top - y, right - x, bottom - y)
    return np.asarray(Image.fromarray(source).resize((width, height), Image.Resampling.LANCZOS, box=rectangle))


def filled(info: SlideInfo, width: int, height: int) -> Rgb:
    """(height, width, 3) of the slide's background colour."""
    rgb = np.empty((height, width, 3), np.uint8)
    rgb[:] = info.background
    return rgb
