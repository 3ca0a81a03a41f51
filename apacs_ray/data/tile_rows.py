"""The row of a tile shard: its columns, and the one function that builds it for both layouts of data."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from PIL import Image

from apacs_ray.config.settings import TilesSettings
from apacs_ray.data.grid import Box, owned_region
from apacs_ray.data.images import Mask, Rgb, encode_image, encode_mask

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
        pa.field("once_left", pa.int32(), nullable=False),  # tile px, `owned_region`
        pa.field("once_top", pa.int32(), nullable=False),
        pa.field("once_right", pa.int32(), nullable=False),
        pa.field("once_bottom", pa.int32(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),  # encoded 8-bit sRGB
        pa.field("image_format", pa.string(), nullable=False),  # jpeg, png or webp
        pa.field("mask", pa.binary()),  # 1-bit PNG, null where not annotated
        pa.field("mask_fraction", pa.float64()),  # 0..1, share of cell pixels
        pa.field("tissue_fraction", pa.float64(), nullable=False),  # 0..1, what `tiles.min_tissue` is compared with
        pa.field("focus", pa.float64(), nullable=False),  # gray levels squared
        pa.field("source_uri", pa.string(), nullable=False),
        pa.field("source_version", pa.string(), nullable=False),
    ]
)

_UNSAFE = re.compile(r"[^\w.-]")


@dataclass(frozen=True)
class TilePlace:
    """The place of a tile in its source, and in the grid that it was cut by.

    Attributes:
        tile_id: `tile_id` of the source's name and the place.
        slide_id: of the slide that the source shows.
        x: left edge, level-0 px.
        y: top edge, level-0 px.
        box: the tile in the grid's px, which are tile px.
        grid_width: of the whole grid, tile px.
        grid_height: of the whole grid, tile px.
        source_uri: of the image or slide.
        source_version: changes when the source or its annotation does.
        level: of the pyramid that was read.
        downsample: level-0 px per tile px.
        mpp: um per tile px, None where unknown.
    """

    tile_id: str
    slide_id: str
    x: int
    y: int
    box: Box
    grid_width: int
    grid_height: int
    source_uri: str
    source_version: str
    level: int = 0
    downsample: float = 1.0
    mpp: float | None = None


@dataclass(frozen=True)
class TilePixels:
    """The content of a tile.

    Attributes:
        image: (H, W, 3) uint8 sRGB, or the same as a picture of Pillow's.
        mask: (H, W) bool, True on cells; None where nobody annotated.
        tissue: share of it (0..1) that is tissue: the number that `tiles.min_tissue` was compared with.
        focus: `quality.focus` of it, gray levels squared.
    """

    image: Rgb | Image.Image
    mask: Mask | None
    tissue: float
    focus: float


def tile_row(place: TilePlace, pixels: TilePixels, tiles: TilesSettings) -> dict[str, Any]:
    """Return the row of `TILE_SCHEMA` for a tile, its image and mask encoded as `tiles` says."""
    box, stride = place.box, tiles.stride or tiles.size
    left, top, right, bottom = owned_region(
        box.x, box.y, place.grid_width, place.grid_height, tiles.size, stride, tiles.last
    )
    return {
        "tile_id": place.tile_id,
        "slide_id": place.slide_id,
        "x": place.x,
        "y": place.y,
        "level": place.level,
        "downsample": place.downsample,
        "mpp": place.mpp,
        "width": box.width,
        "height": box.height,
        "once_left": left,
        "once_top": top,
        "once_right": right,
        "once_bottom": bottom,
        "image": encode_image(pixels.image, tiles.image_format, tiles.quality, tiles.subsampling),
        "image_format": tiles.image_format,
        "mask": None if pixels.mask is None else encode_mask(pixels.mask),
        "mask_fraction": None if pixels.mask is None else float(pixels.mask.mean()),
        "tissue_fraction": pixels.tissue,
        "focus": pixels.focus,
        "source_uri": place.source_uri,
        "source_version": place.source_version,
    }


def tile_id(source: str, x: int, y: int) -> str:
    """Return `SOURCE_X_Y`, the same for the same place, and different for a different place or `source`.

    The id can be a file name: '/' becomes '~', and what is no letter, digit, '.', '-' or '_' is percent-encoded.

    Args:
        source: one image of the run (`Pair.image_id`); a slide id will do only where a slide is one image.
        x: left edge of the tile, level-0 px.
        y: top edge of the tile, level-0 px.

    Returns:
        The id.
    """
    name = _UNSAFE.sub(_escape, source)
    return f"{name}_{x}_{y}"


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    return "~" if character == "/" else "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))
