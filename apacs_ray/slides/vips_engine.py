"""libvips (by pyvips) on tiled TIFF pyramids: generic, BigTIFF, OME (SubIFDs) and Aperio's with JPEG tiles."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VIPS_CONCURRENCY", "1")  # Ray runs a process a core; threads on top of that only cost memory

import pyvips
import tifffile

from apacs_ray.data.images import DAMAGE
from apacs_ray.data.tiles import Box
from apacs_ray.errors import BadInput
from apacs_ray.slides.reader import Level, Rgb, SlideInfo, filled

DECODED = {"NONE", "JPEG", "LZW", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS", "WEBP", "ZSTD", "CCITT_T6"}
UM_PER_UNIT = {2: 25400.0, 3: 10000.0}  # TIFF ResolutionUnit: inch, centimetre
MPP_RANGE = (0.02, 20.0)  # um; a resolution outside is a printer's default and says nothing of the slide
APERIO_MPP = re.compile(r"\|\s*MPP\s*=\s*([0-9.]+)")
OME_MPP = re.compile(r'PhysicalSizeX="([0-9.eE+-]+)"(?:[^>]*PhysicalSizeXUnit="([^"]*)")?')
TO_UM = {"": 1.0, "µm": 1.0, "um": 1.0, "nm": 1e-3, "mm": 1e3}


@dataclass(frozen=True)
class Page:
    """Where libvips finds a level: its page, and which SubIFD of it (None: the page itself)."""

    page: int
    subifd: int | None
    width: int
    height: int


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
            pages = [_page(tiff, level.keyframe) for level in series.levels]
            first = series.keyframe
            if any(page is None for page in pages) or first.photometric is None:
                return None
            if first.bitspersample != 8 or first.samplesperpixel not in (1, 3, 4) or first.planarconfig != 1:
                return None
            known = [page for page in pages if page is not None]
            return Pyramid(tuple(sorted(known, key=lambda page: -page.width)), _mpp(first))
    except (tifffile.TiffFileError, *DAMAGE):
        return None


def _page(tiff: Any, page: Any) -> Page | None:
    if (
        not page.is_tiled
        or page.compression.name not in DECODED
        or page.subsampling not in (None, (1, 1), (2, 2), (2, 1))
    ):
        return None
    index = page.index if isinstance(page.index, int) else None
    if index is not None:
        return Page(index, None, page.imagewidth, page.imagelength)
    parent, *rest = page.treeindex if hasattr(page, "treeindex") else page.index
    return Page(parent, rest[0], page.imagewidth, page.imagelength) if len(rest) == 1 else None


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


class VipsSlide:
    """A tiled TIFF, its levels opened when they are first read."""

    def __init__(self, path: Path, pyramid: Pyramid) -> None:
        self._path = path
        self._pages = pyramid.pages
        first = pyramid.pages[0]
        levels = tuple(Level(page.width, page.height, first.width / page.width) for page in pyramid.pages)
        self.info = SlideInfo("vips", levels, pyramid.mpp, Box(0, 0, first.width, first.height))
        self._images: dict[int, pyvips.Image] = {}
        image = self._level(0)  # a file that libvips cannot open is known now
        if (image.width, image.height) != (first.width, first.height):
            raise BadInput("unreadable", f"{path.name}: libvips finds {image.width} x {image.height} px in its header")

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Rgb:
        size = self.info.levels[level]
        left, top = max(x, 0), max(y, 0)
        right, bottom = min(x + width, size.width), min(y + height, size.height)
        if right <= left or bottom <= top:
            return filled(self.info, width, height)
        try:
            part = self._level(level).crop(left, top, right - left, bottom - top).numpy()
        except pyvips.Error as error:
            raise BadInput("unreadable_region", f"{self._path.name}: {_reason(error)}") from error
        if part.shape[:2] == (height, width):
            return part
        whole = filled(self.info, width, height)
        whole[top - y : bottom - y, left - x : right - x] = part
        return whole

    def close(self) -> None:
        self._images.clear()

    def _level(self, number: int) -> pyvips.Image:
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
