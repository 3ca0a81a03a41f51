"""The engine that reads plain TIFF slides (generic, BigTIFF, OME with SubIFDs, Aperio's), LZW and WebP by libvips.

All other tiles are decoded strictly by `tiff_tiles`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyvips
from PIL import Image

from apacs_ray.data.grid import Box
from apacs_ray.data.images import Mask, Rgb, as_picture
from apacs_ray.data.quality import focus
from apacs_ray.data.vips import open_vips, reason
from apacs_ray.errors import BadInput
from apacs_ray.slides.reader import Level, SlideInfo, filled, level_downsample
from apacs_ray.slides.tiff import OtherEngine, Pyramid
from apacs_ray.slides.tiff_tiles import STRICTLY_DECODED, Pixels, TiffTiles

PROBED_TILES = 3  # whose JPEG headers must fit before the file is taken for plain TIFF


class VipsSlide:
    """A slide that is plain TIFF."""

    def __init__(self, path: Path, pyramid: Pyramid) -> None:
        """Open the slide whose directory is `pyramid`.

        Raises:
            OtherEngine: its tiles are not what its tags say (as an NDPI's are not).
            BadInput: unreadable.
        """
        self._path = path
        self._planes = pyramid.planes
        tiles = [parts[0] for parts in pyramid.planes[0]]
        first = tiles[0]
        levels = tuple(
            Level(one.width, one.height, level_downsample((first.width, first.height), (one.width, one.height)))
            for one in tiles
        )
        bounds = Box(0, 0, first.width, first.height)
        self.info = SlideInfo("vips", levels, pyramid.mpp, bounds, notes=pyramid.notes)
        self._images: dict[tuple[int, int | None], pyvips.Image] = {}
        self._file = path.open("rb")
        try:
            self._require_headers(first)
            if first.compression not in STRICTLY_DECODED:
                self._image(first)  # so that a file fails here that libvips cannot open
        except BaseException:
            self.close()
            raise

    def _require_headers(self, tiles: TiffTiles) -> None:
        held = [(column, row) for column, row in _some(tiles) if not tiles.is_sparse(column, row)]
        if held and not any(tiles.header_fits(self._file.fileno(), column, row) for column, row in held):
            raise OtherEngine("its tiles are no JPEG streams of a tile's size")

    def read(self, level: int, x: int, y: int, width: int, height: int) -> Rgb:
        """Return a region as an array, as `Slide.read`."""
        wanted = Box(x, y, width, height)
        if len(self._planes) == 1:
            return self._level(self._planes[0][level], wanted)
        return max((self._level(plane[level], wanted) for plane in self._planes), key=focus)

    def read_known(self, level: int, x: int, y: int, width: int, height: int) -> tuple[Rgb, Mask]:
        """Return a region and what of it the slide holds, as `KnowsHoles.read_known`."""
        tiles = self._planes[0][level][0]
        known = np.zeros((height, width), bool)
        known[max(-y, 0) : max(tiles.height - y, 0), max(-x, 0) : max(tiles.width - x, 0)] = True
        for hole in tiles.holes(x, y, width, height):
            rows = slice(max(hole.y - y, 0), max(hole.y + hole.height - y, 0))
            known[rows, max(hole.x - x, 0) : max(hole.x + hole.width - x, 0)] = False
        return self.read(level, x, y, width, height), known

    def read_image(self, level: int, x: int, y: int, width: int, height: int) -> Image.Image:
        """Return a region as a picture, as `Slide.read_image`."""
        return as_picture(self.read(level, x, y, width, height))

    def close(self) -> None:
        """Close the slide's files."""
        self._images.clear()
        self._file.close()

    def _level(self, parts: tuple[TiffTiles, ...], wanted: Box) -> Rgb:
        if len(parts) == 1:
            return self._region(parts[0], wanted)
        return np.stack([self._region(part, wanted)[..., 0] for part in parts], axis=2)

    def _region(self, tiles: TiffTiles, wanted: Box) -> Rgb:
        """Read `wanted` of an image from the tiles below it; what lies outside or is not in the file is background."""
        left, top = max(wanted.x, 0), max(wanted.y, 0)
        right, bottom = min(wanted.x + wanted.width, tiles.width), min(wanted.y + wanted.height, tiles.height)
        if right <= left or bottom <= top:
            return filled(self.info, wanted.width, wanted.height)
        inside = Box(left, top, right - left, bottom - top)
        whole = filled(self.info, wanted.width, wanted.height) if inside != wanted else _empty(wanted)
        for place, part in self._pieces(tiles, inside):
            y, x = place.y - wanted.y, place.x - wanted.x
            whole[y : y + place.height, x : x + place.width] = self.info.background if part is None else part
        return whole

    def _pieces(self, tiles: TiffTiles, inside: Box) -> Iterator[tuple[Box, Rgb | None]]:
        """Yield rectangles that cover `inside`, with their colors; None where the file holds nothing."""
        right, bottom = inside.x + inside.width, inside.y + inside.height
        columns = range(inside.x // tiles.tile_width, -(-right // tiles.tile_width))
        rows = range(inside.y // tiles.tile_height, -(-bottom // tiles.tile_height))
        by_vips = tiles.compression not in STRICTLY_DECODED
        if by_vips and not any(tiles.is_sparse(column, row) for row in rows for column in columns):
            yield inside, self._by_vips(tiles, inside)
            return
        for row in rows:
            for column in columns:
                x, y = column * tiles.tile_width, row * tiles.tile_height
                left, top = max(x, inside.x), max(y, inside.y)
                end, foot = min(x + tiles.tile_width, right), min(y + tiles.tile_height, bottom)
                place = Box(left, top, end - left, foot - top)
                if tiles.is_sparse(column, row):
                    yield place, None
                elif by_vips:
                    yield place, self._by_vips(tiles, place)
                else:
                    pixels = self._decoded(tiles, column, row)[top - y : foot - y, left - x : end - x]
                    yield place, self._colors(tiles, pixels)

    def _decoded(self, tiles: TiffTiles, column: int, row: int) -> Pixels:
        try:
            return tiles.read(self._file.fileno(), column, row)
        except (ValueError, IndexError) as error:
            what = f"{tiles.compression} {'strip' if tiles.strips else f'tile {column},'} {row}"
            where = f"{self._path.name}: {what} of {tiles.width} x {tiles.height} px"
            raise BadInput("unreadable_region", f"{where}: {error}") from error

    def _colors(self, tiles: TiffTiles, pixels: Pixels) -> Rgb:
        """Convert samples as stored to RGB (or (h, w, 1) gray, which spreads over the channels)."""
        colors = 3 if tiles.samples >= 3 else 1
        rgb = pixels[..., :colors]
        if tiles.palette is not None:
            rgb = tiles.palette[rgb[..., 0]]
        elif tiles.photometric == "MINISWHITE":
            rgb = 255 - rgb
        return self._on_background(rgb, pixels[..., colors], tiles.alpha) if tiles.alpha else rgb

    def _on_background(self, rgb: Pixels, alpha: Pixels, kind: str) -> Rgb:
        if (alpha == 255).all():
            return rgb
        share = alpha[..., None].astype(np.float32) / 255
        colors = rgb.astype(np.float32) * (share if kind == "straight" else 1)
        background = np.asarray(self.info.background, np.float32)
        return np.rint(np.minimum(colors + (1 - share) * background, 255)).astype(np.uint8)

    def _by_vips(self, tiles: TiffTiles, place: Box) -> Rgb:
        try:
            pixels: Pixels = self._image(tiles).crop(place.x, place.y, place.width, place.height).numpy()
        except pyvips.Error as error:
            raise BadInput("unreadable_region", f"{self._path.name}: {reason(error)}") from error
        pixels = pixels.reshape(place.height, place.width, -1)
        colors = 3 if pixels.shape[2] >= 3 else 1
        if not tiles.alpha:
            return pixels[..., :colors]
        # libvips has undone the multiplication of associated alpha
        return self._on_background(pixels[..., :colors], pixels[..., colors], "straight")

    def _image(self, tiles: TiffTiles) -> Any:
        key = tiles.page, tiles.subifd
        if key not in self._images:
            where: dict[str, Any] = {"page": key[0]} | ({} if key[1] is None else {"subifd": key[1]})
            image = open_vips(self._path, **where)
            if (image.width, image.height) != (tiles.width, tiles.height):
                size = f"{image.width} x {image.height} px"
                raise BadInput("unreadable", f"{self._path.name}: libvips finds {size} in its header")
            self._images[key] = image
        return self._images[key]


def _empty(box: Box) -> Rgb:
    return np.empty((box.height, box.width, 3), np.uint8)


def _some(tiles: TiffTiles) -> Iterator[tuple[int, int]]:
    """Yield a few tiles, spread over the image: (column, row)."""
    count = tiles.across * tiles.down
    for number in sorted({count * part // (PROBED_TILES + 1) for part in range(1, PROBED_TILES + 1)}):
        yield number % tiles.across, number // tiles.across
