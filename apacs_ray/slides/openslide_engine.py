"""OpenSlide: MRXS, NDPI, SCN, VMS, BIF, DICOM, JPEG 2000 in SVS, and what else libvips cannot decode."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import openslide
from openslide import lowlevel
from PIL import Image

from apacs_ray.data.tiles import Box
from apacs_ray.errors import BadInput
from apacs_ray.slides.reader import WHITE, Level, Mask, Rgb, SlideInfo

PIXEL = ctypes.POINTER(ctypes.c_uint32)
OPAQUE = np.uint32(0xFF000000)


class OpenSlideSlide:
    """A slide in OpenSlide, which refuses everything after its first error: so a failed read reopens and tries once
    more, and a region that fails again is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._slide = self._open()
        self.info = _info(self._slide)

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Rgb:
        return self.read_known(level, x, y, width, height)[0]

    def read_known(self, level: int, x: int, y: int, width: int, height: int) -> tuple[Rgb, Mask]:
        downsample = self.info.levels[level].downsample
        at = round(x * downsample), round(y * downsample)
        try:
            return self._read(level, *at, width, height)
        except openslide.OpenSlideError:
            self._slide.close()
            self._slide = self._open()
        try:
            return self._read(level, *at, width, height)
        except openslide.OpenSlideError as error:
            self._slide.close()
            self._slide = self._open()
            raise BadInput("unreadable_region", f"{self._path.name}: {error}") from error

    def close(self) -> None:
        self._slide.close()

    def _open(self) -> openslide.OpenSlide:
        try:
            return openslide.OpenSlide(str(self._path))
        except openslide.OpenSlideUnsupportedFormatError as error:
            raise BadInput("unsupported_slide", f"{self._path.name}: OpenSlide knows no such format") from error
        except (openslide.OpenSlideError, OSError) as error:
            raise BadInput("unreadable", f"{self._path.name}: {error}") from error

    def _read(self, level: int, x: int, y: int, width: int, height: int) -> tuple[Rgb, Mask]:
        """By OpenSlide's C function into an array: premultiplied ARGB, (x, y) in level-0 px."""
        argb = np.empty((height, width), np.uint32)
        lowlevel._read_region(self._slide._osr, argb.ctypes.data_as(PIXEL), x, y, level, width, height)
        picture = Image.frombuffer("RGB", (width, height), argb, "raw", "BGRX", 0, 1)  # little-endian ARGB
        rgb = np.asarray(picture)
        transparent = argb < OPAQUE
        if transparent.any():
            missing = (255 - (argb >> np.uint32(24)))[transparent].astype(np.float32)[:, None] / 255
            rgb = rgb.copy()
            rgb[transparent] = np.rint(rgb[transparent] + missing * np.array(self.info.background, np.float32))
        return rgb, ~transparent


def _info(slide: openslide.OpenSlide) -> SlideInfo:
    properties = slide.properties
    levels = tuple(
        Level(width, height, downsample)
        for (width, height), downsample in zip(slide.level_dimensions, slide.level_downsamples, strict=True)
    )
    x = int(properties.get(openslide.PROPERTY_NAME_BOUNDS_X, 0))
    y = int(properties.get(openslide.PROPERTY_NAME_BOUNDS_Y, 0))
    width = int(properties.get(openslide.PROPERTY_NAME_BOUNDS_WIDTH, levels[0].width - x))
    height = int(properties.get(openslide.PROPERTY_NAME_BOUNDS_HEIGHT, levels[0].height - y))
    colour = properties.get(openslide.PROPERTY_NAME_BACKGROUND_COLOR)
    background = WHITE if colour is None else tuple(bytes.fromhex(colour))
    return SlideInfo("openslide", levels, _mpp(properties), Box(x, y, width, height), background)  # type: ignore[arg-type]


def _mpp(properties: openslide._PropertyMap) -> float | None:
    """um per px, when it is the same in both directions (to 1 %): tiles are square in px and in um."""
    try:
        x = float(properties[openslide.PROPERTY_NAME_MPP_X])
        y = float(properties[openslide.PROPERTY_NAME_MPP_Y])
    except (KeyError, ValueError):
        return None
    return x if x > 0 and abs(x - y) <= 0.01 * x else None
