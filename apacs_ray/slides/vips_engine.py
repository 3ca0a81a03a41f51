"""Tiled TIFF pyramids (generic, BigTIFF, OME with SubIFDs, Aperio's): libvips, and libjpeg-turbo for JPEG tiles."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VIPS_CONCURRENCY", "1")  # Ray runs a process a core; threads on top of that only cost memory

import numpy as np
import numpy.typing as npt
import pyvips
import simplejpeg
import tifffile

from apacs_ray.data.images import DAMAGE
from apacs_ray.data.tiles import Box
from apacs_ray.errors import BadInput
from apacs_ray.slides.reader import Level, Mask, Rgb, SlideInfo, filled

DECODED = {"NONE", "JPEG", "LZW", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS", "WEBP", "ZSTD"}
PHOTOMETRICS = {"RGB", "YCBCR", "MINISBLACK"}
MAX_TILE = 1 << 26  # px
SOI = b"\xff\xd8"
ADOBE_RGB, ADOBE_YCC = (b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([kind]) for kind in (0, 1))
UM_PER_UNIT = {2: 25400.0, 3: 10000.0}  # TIFF ResolutionUnit: inch, centimetre
MPP_RANGE = (0.02, 20.0)  # um; a resolution outside is a printer's default and says nothing of the slide
APERIO_MPP = re.compile(r"\|\s*MPP\s*=\s*([0-9.]+)")
OME_MPP = re.compile(r'PhysicalSizeX="([0-9.eE+-]+)"(?:[^>]*PhysicalSizeXUnit="([^"]*)")?')
TO_UM = {"": 1.0, "µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3}


@dataclass(frozen=True)
class Page:
    """A level: its page for libvips and which SubIFD of it (None: the page itself); `jpeg` where its tiles are JPEG."""

    page: int
    subifd: int | None
    width: int
    height: int
    jpeg: JpegTiles | None = None


@dataclass(frozen=True)
class Pyramid:
    """A tiled TIFF that libvips can decode."""

    pages: tuple[Page, ...]
    mpp: float | None


def tiff_levels(path: Path) -> Pyramid | None:
    """The pyramid of a tiled TIFF, largest level first; None for anything that libvips cannot decode.

    Whether the file is whole shows when it is read; a directory that cannot be parsed is left to OpenSlide,
    which then says what is wrong.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            series = tiff.series[0]
            first = series.keyframe
            if first.bitspersample != 8 or first.samplesperpixel not in (1, 3, 4) or first.planarconfig != 1:
                return None
            pages = [_page(level.keyframe) for level in series.levels]
            known = [page for page in pages if page is not None]
            if len(known) < len(pages):
                return None
            return Pyramid(tuple(sorted(known, key=lambda page: -page.width)), _mpp(first))
    except (tifffile.TiffFileError, *DAMAGE):
        return None


def _page(page: Any) -> Page | None:
    if not page.is_tiled or page.compression.name not in DECODED or page.photometric.name not in PHOTOMETRICS:
        return None
    if min(page.imagewidth, page.imagelength, page.tilewidth, page.tilelength) < 1:
        return None
    if page.tilewidth * page.tilelength > MAX_TILE:  # a tile is decoded as a whole
        raise BadInput("too_large", f"tiles of {page.tilewidth} x {page.tilelength} px; {MAX_TILE} px are the limit")
    number, *subifd = page.treeindex
    if len(subifd) > 1:
        return None
    jpeg = None
    if page.compression.name == "JPEG" and page.samplesperpixel == 3:
        jpeg = JpegTiles(
            np.asarray(page.dataoffsets, np.int64),
            np.asarray(page.databytecounts, np.int64),
            page.tilewidth,
            page.tilelength,
            page.jpegtables or b"",
            page.photometric.name == "YCBCR",
        )
    # libvips counts SubIFDs from 0, tifffile the level itself as 0
    return Page(number, subifd[0] - 1 if subifd else None, page.imagewidth, page.imagelength, jpeg)


def _mpp(page: Any) -> float | None:
    """um per px: Aperio's and OME's own words first, else the TIFF resolution."""
    text = page.description or ""
    if (aperio := APERIO_MPP.search(text)) is not None:
        return _sensible(float(aperio.group(1)))
    if (ome := OME_MPP.search(text)) is not None and (ome.group(2) or "") in TO_UM:
        return _sensible(float(ome.group(1)) * TO_UM[ome.group(2) or ""])
    if text.startswith("Aperio"):
        return None  # its resolution tags are meaningless
    unit = page.tags.valueof("ResolutionUnit", 2)
    numerator, denominator = page.tags.valueof("XResolution", (0, 1))
    if not numerator or not denominator or int(unit) not in UM_PER_UNIT:
        return None
    return _sensible(UM_PER_UNIT[int(unit)] * denominator / numerator)


def _sensible(mpp: float) -> float | None:
    return mpp if MPP_RANGE[0] <= mpp <= MPP_RANGE[1] else None


@dataclass(frozen=True)
class JpegTiles:
    """Where the JPEG tiles of a level lie. They are decoded strictly, by libjpeg-turbo itself: libvips passes over
    damage within a JPEG stream without a word, and takes longer for the same pixels."""

    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    width: int
    height: int
    tables: bytes
    ycbcr: bool

    def missing(self, box: Box, width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
        """Left, top, right and bottom of the tiles below `box`, of a level so large, that the file does not hold."""
        across, down = -(-width // self.width), -(-height // self.height)
        first, last = max(box.x // self.width, 0), min(-(-(box.x + box.width) // self.width), across)
        for row in range(max(box.y // self.height, 0), min(-(-(box.y + box.height) // self.height), down)):
            for column in first + np.flatnonzero(self.sizes[row * across + first : row * across + last] == 0):
                x, y = int(column) * self.width, row * self.height
                yield x, y, x + self.width, y + self.height

    def read(self, file: int, across: int, column: int, row: int) -> Rgb | None:
        """A tile, or None where the file holds none. Raises ValueError when its stream is damaged."""
        place = row * across + column
        size = int(self.sizes[place])
        if size == 0:
            return None
        if not 0 <= self.offsets[place] <= os.fstat(file).st_size - size:  # or memory is taken for what is not there
            raise ValueError("the file ends before it")
        stream = os.pread(file, size, int(self.offsets[place]))
        # the tables and the colour space of an abbreviated stream stand in the TIFF's tags
        whole = SOI + (ADOBE_YCC if self.ycbcr else ADOBE_RGB) + self.tables[2:-2] + stream[2:]
        height, width, *_ = simplejpeg.decode_jpeg_header(whole)
        if (height, width) != (self.height, self.width):  # before memory is taken for what it says it is
            raise ValueError(f"it measures {width} x {height} px")
        rgb: Rgb = simplejpeg.decode_jpeg(whole, strict=True)
        return rgb


class VipsSlide:
    """A tiled TIFF, its levels opened when they are first read."""

    def __init__(self, path: Path, pyramid: Pyramid) -> None:
        self._path = path
        self._pages = pyramid.pages
        first = pyramid.pages[0]
        levels = tuple(Level(page.width, page.height, first.width / page.width) for page in pyramid.pages)
        self.info = SlideInfo("vips", levels, pyramid.mpp, Box(0, 0, first.width, first.height))
        self._images: dict[int, pyvips.Image] = {}
        self._file = path.open("rb")
        image = self._image(0)  # a file that libvips cannot open is known now
        if (image.width, image.height) != (first.width, first.height):
            raise BadInput("unreadable", f"{path.name}: libvips finds {image.width} x {image.height} px in its header")

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Rgb:
        page = self._pages[level]
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, page.width), min(y + height, page.height)
        if right <= left or bottom <= top:
            return filled(self.info, width, height)
        if page.jpeg is not None:
            return self._joined(page, page.jpeg, Box(x, y, width, height), Box(left, top, right - left, bottom - top))
        try:
            part: Rgb = self._image(level).crop(left, top, right - left, bottom - top).numpy()
        except pyvips.Error as error:
            raise BadInput("unreadable_region", f"{self._path.name}: {_reason(error)}") from error
        if part.shape[:2] == (height, width):
            return part
        whole = filled(self.info, width, height)
        whole[top - y : bottom - y, left - x : right - x] = part
        return whole

    def read_known(self, level: int, x: int, y: int, width: int, height: int) -> tuple[Rgb, Mask]:
        page = self._pages[level]
        known = np.zeros((height, width), bool)
        known[max(-y, 0) : max(page.height - y, 0), max(-x, 0) : max(page.width - x, 0)] = True
        if page.jpeg is not None:
            for left, top, right, foot in page.jpeg.missing(Box(x, y, width, height), page.width, page.height):
                known[max(top - y, 0) : max(foot - y, 0), max(left - x, 0) : max(right - x, 0)] = False
        return self.read(level, x, y, width, height), known

    def _joined(self, page: Page, tiles: JpegTiles, wanted: Box, inside: Box) -> Rgb:
        """`wanted`, of which `inside` lies in the level, from the JPEG tiles below it."""
        if (inside.width, inside.height) == (wanted.width, wanted.height):
            whole = np.empty((wanted.height, wanted.width, 3), np.uint8)
        else:
            whole = filled(self.info, wanted.width, wanted.height)
        across = -(-page.width // tiles.width)
        right, bottom = inside.x + inside.width, inside.y + inside.height
        for row in range(inside.y // tiles.height, -(-bottom // tiles.height)):
            for column in range(inside.x // tiles.width, -(-right // tiles.width)):
                try:
                    tile = tiles.read(self._file.fileno(), across, column, row)
                except (ValueError, IndexError) as error:
                    what = f"{self._path.name}: JPEG tile {column}, {row} of {page.width} x {page.height} px"
                    raise BadInput("unreadable_region", f"{what}: {error}") from error
                x, y = column * tiles.width, row * tiles.height
                left, top = max(x, inside.x), max(y, inside.y)
                end, foot = min(x + tiles.width, right), min(y + tiles.height, bottom)
                part = self.info.background if tile is None else tile[top - y : foot - y, left - x : end - x]
                whole[top - wanted.y : foot - wanted.y, left - wanted.x : end - wanted.x] = part
        return whole

    def close(self) -> None:
        self._images.clear()
        self._file.close()

    def _image(self, number: int) -> pyvips.Image:
        if number not in self._images:
            page = self._pages[number]
            where: dict[str, Any] = {"page": page.page} | ({} if page.subifd is None else {"subifd": page.subifd})
            try:
                image = pyvips.Image.tiffload(str(self._path), access="random", fail_on="error", **where)
                if image.bands == 4:
                    image = image.flatten(background=list(self.info.background))
                if image.bands == 1:
                    image = image.colourspace("srgb")
            except pyvips.Error as error:
                raise BadInput("unreadable", f"{self._path.name}: {_reason(error)}") from error
            self._images[number] = image
        return self._images[number]


def _reason(error: pyvips.Error) -> str:
    """libvips' own words in one line."""
    lines = [line.strip() for line in str(error.detail or error.message).splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines))[:300] or "libvips cannot read it"
