"""The directory of a TIFF slide: its largest image, that image's levels and focal planes, and how tiles are encoded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from apacs_ray.data.image_header import DAMAGE
from apacs_ray.errors import BadInput
from apacs_ray.slides.mpp import square_mpp, tiff_scale
from apacs_ray.slides.tiff_tiles import STRICTLY_DECODED, Alpha, TiffTiles

BY_VIPS = {"LZW", "WEBP"}  # libvips decodes these, in one plane
GRAY, COLOR = {"MINISBLACK", "MINISWHITE", "PALETTE"}, {"RGB", "YCBCR", "MINISBLACK"}
MAX_TILE = 1 << 26  # px
PLANES = "ZIQ"  # tifffile's names of axes along which focal planes lie; I and Q are axes without a name
CONVERT = "convert it, for example: vips tiffsave IN.tif OUT.tif --tile --pyramid --compression jpeg --Q 90 --bigtiff"

Parts = tuple[TiffTiles, ...]  # a level: one image, or three of one channel each


class OtherEngine(Exception):
    """libvips does not decode this file; OpenSlide may."""


@dataclass(frozen=True)
class Pyramid:
    """A TIFF that this engine reads: focal planes (those that are wanted), each a list of levels, largest first."""

    planes: tuple[tuple[Parts, ...], ...]
    mpp: float | None
    notes: tuple[str, ...]


def read_pyramid(path: Path, plane: str = "middle") -> Pyramid:
    """Read the directory of a TIFF: its largest image, and how that is stored.

    Whether the file is whole shows when it is read; a directory that cannot be parsed is left to OpenSlide, which then
    says what is wrong.

    Args:
        path: of a local file.
        plane: as in `open_slide`.

    Returns:
        The image's levels and focal planes.

    Raises:
        OtherEngine: OpenSlide may read it.
        BadInput: unsupported_slide, too_large, unreadable; no engine here reads it right.
    """
    try:
        with tifffile.TiffFile(path) as tiff:
            return _pyramid(tiff, path.name, plane)
    except (tifffile.TiffFileError, *DAMAGE) as error:
        raise OtherEngine(f"no TIFF that can be parsed ({str(error)[:120] or type(error).__name__})") from error


def _pyramid(tiff: tifffile.TiffFile, name: str, plane: str) -> Pyramid:
    if not tiff.pages.first.imagewidth or not tiff.pages.first.imagelength:  # or the next level would count
        raise OtherEngine("its first image has no size")
    series = max(tiff.series, key=lambda one: one.keyframe.imagewidth * one.keyframe.imagelength)
    first = series.keyframe
    _require_readable(first, name)
    planes, channels = _extents(series.levels[0], name)
    wanted, note = _wanted(planes, plane, name)
    levels = sorted(series.levels, key=lambda level: -level.keyframe.imagewidth)
    parts = [[_parts(level, number, planes, channels) for level in levels] for number in wanted]
    mpp, scale_note = square_mpp(tiff_scale(first, str(tiff.pages.first.description or "")))
    notes = [note, scale_note]
    if channels > 1:
        notes.append("its three channels lie apart and are taken for red, green and blue")
    if series is not tiff.series[0]:
        size = f"{first.imagewidth} x {first.imagelength} px"
        notes.append(f"of {len(tiff.series)} images the largest, {size}, is taken")
    return Pyramid(tuple(map(tuple, parts)), mpp, tuple(text for text in notes if text))


def _require_readable(page: Any, name: str) -> None:
    """Raise BadInput for images that some engine would read wrong, and none right."""
    bits = page.bitspersample if isinstance(page.bitspersample, tuple) else (page.bitspersample,)
    if set(bits) != {8} or int(page.sampleformat or 1) != 1:
        kind = "" if int(page.sampleformat or 1) == 1 else " with a sign or fractions"
        stored = "/".join(map(str, sorted(set(bits))))
        raise BadInput(
            "unsupported_slide",
            f"{name}: {stored} bits a sample{kind}; slides have 8 (scale them to 0..255, then save it anew)",
        )
    orientation = int(page.tags.valueof(274, 1) or 1)
    if orientation != 1:
        raise BadInput(
            "unsupported_slide",
            f"{name}: its orientation tag ({orientation}) turns or mirrors it, on which viewers do not agree; "
            "save it upright (orientation 1)",
        )
    photometric, samples = page.photometric.name, page.samplesperpixel
    color = samples >= 3 and photometric in COLOR
    if not color and not (samples in (1, 2) and photometric in GRAY):
        raise BadInput(
            "unsupported_slide", f"{name}: {samples} samples of {photometric}; slides are RGB or gray; {CONVERT}"
        )


def _extents(level: Any, name: str) -> tuple[int, int]:
    """Return how many focal planes a level has, and pages of one channel each. Raises BadInput for other axes."""
    planes = channels = 1
    for axis, length in zip(level.axes, level.shape, strict=True):
        if axis in PLANES:
            planes *= length
        elif axis == "C" and level.keyframe.samplesperpixel == 1:
            channels *= length
        elif axis not in "YXS" and length > 1:
            raise BadInput(
                "unsupported_slide", f"{name}: {length} images along axis {axis}; save the one that is meant"
            )
    if channels not in (1, 3):
        raise BadInput("unsupported_slide", f"{name}: {channels} channels, which are no RGB; {CONVERT}")
    return planes, channels


def _wanted(planes: int, plane: str, name: str) -> tuple[Sequence[int], str | None]:
    if planes == 1:
        return [0], None
    if plane == "sharpest":
        return range(planes), f"of {planes} focal planes the sharpest of each tile is taken (data.plane)"
    number = planes // 2 if plane == "middle" else int(plane)
    if not 0 <= number < planes:
        raise BadInput(
            "unsupported_slide", f"{name}: no plane {plane} (data.plane) among its {planes}, 0 to {planes - 1}"
        )
    which = "the middle one" if plane == "middle" else "the wanted one"
    return [number], f"of {planes} focal planes {which}, plane {number}, is taken (data.plane)"


def _parts(level: Any, plane: int, planes: int, channels: int) -> Parts:
    """Return the images of one plane of a level; pages lie in the order of the axes."""
    lengths = [(axis, length) for axis, length in zip(level.axes, level.shape, strict=True) if axis in PLANES + "C"]
    if channels == 1:
        lengths = [(axis, length) for axis, length in lengths if axis != "C"]
    numbers = np.arange(max(1, math.prod(length for _, length in lengths)))
    numbers = numbers.reshape([length for _, length in lengths] or [1])
    if channels == 3:
        numbers = np.moveaxis(numbers, [axis for axis, _ in lengths].index("C"), -1)
    pages = [level.pages[number] for number in numbers.reshape(planes, channels)[plane]]
    if any(page is None for page in pages):
        raise BadInput("unsupported_slide", f"plane {plane} is not in this file")
    return tuple(_tiles(page, level.keyframe) for page in pages)


def _tiles(page: Any, key: Any) -> TiffTiles:
    """Return how an image's tiles are encoded; `key` has the tags that pages of one kind share. Raises OtherEngine."""
    compression = key.compression.name
    planar = key.planarconfig == 2 and key.samplesperpixel > 1
    predictor = int(key.predictor or 1)
    what = f"{compression} in planes" if planar else compression
    strict = compression in STRICTLY_DECODED and predictor in (1, 2) and not _is_subsampled_raw(key)
    if compression == "JPEG" and not (planar or key.samplesperpixel in (1, 3)):
        raise OtherEngine(f"JPEG tiles of {key.samplesperpixel} samples")
    if not strict and (compression not in BY_VIPS or planar):
        if key.extrasamples:  # OpenSlide would take it for an alpha
            raise BadInput("unsupported_slide", f"{what} with an extra sample beside the colors; {CONVERT}")
        raise OtherEngine(f"libvips does not decode {what} ({CONVERT})")
    width, height = key.imagewidth, key.imagelength
    tile_width, tile_height = (
        (key.tilewidth, key.tilelength) if key.is_tiled else (width, min(key.rowsperstrip, height))
    )
    if min(width, height, tile_width, tile_height) < 1:
        raise OtherEngine("an image or a tile without size")
    if tile_width * tile_height > MAX_TILE:  # a tile is decoded as a whole
        strips = "" if key.is_tiled else f"; it is stored in strips, not tiles: {CONVERT}"
        raise BadInput("too_large", f"tiles of {tile_width} x {tile_height} px; {MAX_TILE} px are the limit{strips}")
    tiles = -(-width // tile_width) * -(-height // tile_height) * (key.samplesperpixel if planar else 1)
    if not tiles == len(page.dataoffsets) == len(page.databytecounts):
        raise BadInput("unreadable", f"{len(page.dataoffsets)} tiles in its directory, where its size asks for {tiles}")
    number, *subifd = page.treeindex
    if len(subifd) > 1:
        raise OtherEngine("levels within levels")
    return TiffTiles(
        # libvips counts SubIFDs from 0, tifffile the level itself as 0
        number,
        subifd[0] - 1 if subifd else None,
        width,
        height,
        tile_width,
        tile_height,
        key.samplesperpixel,
        planar,
        not key.is_tiled,
        compression,
        key.photometric.name,
        predictor,
        page.jpegtables or key.jpegtables or b"",
        _alpha(key),
        _palette(key),
        np.asarray(page.dataoffsets, np.int64),
        np.asarray(page.databytecounts, np.int64),
    )


def _is_subsampled_raw(key: Any) -> bool:
    """Tell whether it is YCbCr, but not JPEG's: its samples do not lie px by px."""
    return bool(key.photometric.name == "YCBCR" and key.compression.name != "JPEG")


def _alpha(key: Any) -> Alpha:
    """Return what kind of alpha the sample after the colors is: any only when the file says so."""
    extra = [int(kind) for kind in np.atleast_1d(key.extrasamples or ())]
    if not extra:
        return ""
    return {1: "associated", 2: "straight"}.get(extra[0], "")  # type: ignore[return-value]


def _palette(key: Any) -> Any:
    if key.photometric.name != "PALETTE":
        return None
    return np.ascontiguousarray((np.asarray(key.colormap) >> 8).astype(np.uint8).T)
