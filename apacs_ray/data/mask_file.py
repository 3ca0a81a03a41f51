"""An open mask file: its size, how it is stored, and its pixels by region, from memory or from a local file.

Both layouts read masks here, so that a file means the same in each. libvips decodes PNG, JPEG and most TIFF, by region
where the TIFF is tiled. Pillow decodes as a whole what libvips lacks: BMP, the numbers of a PNG's colors, TIFF in ZSTD
or LZMA, tiles of separate planes. Streams whose damage a decoder does not report are checked by a stricter one
(`streams`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyvips
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from apacs_ray.data.grid import Box
from apacs_ray.data.image_header import DAMAGE, READERS, SWAPS_SIDES, code_of
from apacs_ray.data.mask_header import MAX_TILE, Palette, read_stored
from apacs_ray.data.png import without_texts
from apacs_ray.data.streams import decode_jpeg, joined_jpeg, jpeg_size, require_whole_deflate
from apacs_ray.data.vips import open_vips, reason
from apacs_ray.errors import BadInput

Pixels = npt.NDArray[Any]  # (H, W) or (H, W, bands), as stored
BLOCK = 1 << 24  # px that are read at a time
# EXIF orientation -> the stored image transposed, then mirrored left to right, then top to bottom
TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


class MaskFile:
    """An open mask. `width` and `height` are px with its orientation applied."""

    def __init__(self, source: Path | bytes, max_pixels: int) -> None:
        """Open a mask from a local file or from memory; only its header is read.

        Args:
            source: the file.
            max_pixels: of a file that cannot be read in parts.

        Raises:
            BadInput: empty_file, unreadable, truncated, multiple_frames, unsupported_mode, too_large.
        """
        self._source = source
        with _stream(source) as stream:
            self.stored = stored = read_stored(stream, max_pixels)
        if stored.tile is None or stored.by_pillow:
            require_fits(stored.width, stored.height, max_pixels)
        turned = stored.orientation in SWAPS_SIDES
        self.width, self.height = (stored.height, stored.width) if turned else (stored.width, stored.height)
        self._array: Pixels | None = None
        self._image: pyvips.Image | None = None

    def read(self, box: Box) -> Pixels:
        """Return the pixels of a box that lies inside the image. Raises BadInput (unreadable, truncated)."""
        transposed, mirrored, flipped = TURNS[self.stored.orientation]
        x = self.width - box.x - box.width if mirrored else box.x
        y = self.height - box.y - box.height if flipped else box.y
        raw = Box(y, x, box.height, box.width) if transposed else Box(x, y, box.width, box.height)
        pixels = self._read(raw)
        pixels = pixels.swapaxes(0, 1) if transposed else pixels
        return pixels[:: -1 if flipped else 1, :: -1 if mirrored else 1]

    def blocks(self) -> Iterator[Pixels]:
        """Yield all pixels once, some `BLOCK` at a time, in the order in which they are stored."""
        wide, high = self.stored.tile or (self.stored.width, max(1, BLOCK // self.stored.width))
        across = max(1, BLOCK // (wide * high)) * wide
        for y in range(0, self.stored.height, high):
            for x in range(0, self.stored.width, across):
                yield self._read(Box(x, y, min(across, self.stored.width - x), min(high, self.stored.height - y)))

    def require_sound(self) -> None:
        """Raise BadInput (unreadable) where a stream is damaged in a way that the decoder does not tell.

        libtiff leaves the checksum of Deflate alone, and libjpeg goes on after errors. Damage of raw pixels and of
        lossless WebP, and single bits of LZW, PackBits, CCITT and JPEG, nothing can tell.
        """
        if self.stored.by_pillow or self.stored.compression not in ("DEFLATE", "ADOBE_DEFLATE", "JPEG"):
            return
        with _stream(self._source) as stream:
            for number, (offset, size) in enumerate(zip(self.stored.offsets, self.stored.sizes, strict=True)):
                if size:
                    stream.seek(offset)
                    self._check(number, stream.read(size))

    def _check(self, number: int, content: bytes) -> None:
        try:
            if self.stored.compression == "JPEG":
                whole = joined_jpeg(content, self.stored.tables)
                height, width = jpeg_size(whole)
                if width * height > MAX_TILE:
                    raise ValueError(f"it measures {width} x {height} px")
                decode_jpeg(whole, "GRAY")
            else:
                require_whole_deflate(content)
        except ValueError as error:
            raise BadInput("unreadable", f"its part {number} is damaged: {error}") from error

    def _read(self, box: Box) -> Pixels:
        """Read a box in stored px; tiles that the file leaves out are 0."""
        if self.stored.by_pillow:
            if self._array is None:
                with _stream(self._source) as stream:
                    self._array = _by_pillow(stream)
            if self._array.shape[:2] != (self.stored.height, self.stored.width):
                raise BadInput("unreadable", "its pixels are not as many as its header says")
            part = self._array[box.y : box.y + box.height, box.x : box.x + box.width]
            return _colors(part, self.stored.palette) if self.stored.palette is not None and part.ndim == 2 else part
        image = self._opened()
        if self.stored.tile is None or 0 not in self.stored.sizes:
            return _cropped(image, box)
        bands = () if image.bands == 1 else (image.bands,)
        whole = np.zeros((box.height, box.width, *bands), _cropped_type(image))
        wide, high = self.stored.tile
        across = -(-self.stored.width // wide)
        for row in range(box.y // high, -(-(box.y + box.height) // high)):
            for column in range(box.x // wide, -(-(box.x + box.width) // wide)):
                if not self.stored.sizes[row * across + column]:
                    continue
                x, y = max(box.x, column * wide), max(box.y, row * high)
                right, bottom = min(box.x + box.width, (column + 1) * wide), min(box.y + box.height, (row + 1) * high)
                part = _cropped(image, Box(x, y, right - x, bottom - y))
                whole[y - box.y : bottom - box.y, x - box.x : right - box.x] = part
        return whole

    def _opened(self) -> pyvips.Image:
        if self._image is None:
            self._image = image = open_vips(self._source)
            if (image.width, image.height) != (self.stored.width, self.stored.height):
                raise BadInput("unreadable", f"libvips finds {image.width} x {image.height} px in its header")
            if image.bands > 4 or image.interpretation not in ("b-w", "grey16", "srgb", "rgb", "rgb16", "multiband"):
                raise BadInput("unsupported_mode", f"{image.bands} channels of {image.interpretation}; save it as gray")
        return self._image


def _colors(indices: Pixels, palette: Palette) -> Pixels:
    if indices.max() >= len(palette):
        raise BadInput("unreadable", f"the mask uses color {indices.max()} of a palette of {len(palette)}")
    colors: Pixels = palette.astype(np.uint8)[indices]
    return colors


def require_fits(width: int, height: int, max_pixels: int) -> None:
    """Raise BadInput (too_large) for more than `max_pixels`."""
    if width * height > max_pixels:
        raise BadInput(
            "too_large",
            f"{width} x {height} px exceed data.max_pixels ({max_pixels}); save a whole slide's mask as a tiled TIFF",
        )


def _stream(source: Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")


def _cropped(image: pyvips.Image, box: Box) -> Pixels:
    try:
        pixels: Pixels = np.asarray(image.crop(box.x, box.y, box.width, box.height).numpy())
    except pyvips.Error as error:
        words = reason(error)
        raise BadInput(code_of(error), f"the pixels cannot be read: {words}") from error
    return pixels.reshape(box.height, box.width, *(() if image.bands == 1 else (image.bands,)))


def _cropped_type(image: pyvips.Image) -> npt.DTypeLike:
    types = {"uchar": "u1", "char": "i1", "ushort": "u2", "short": "i2", "uint": "u4", "int": "i4", "float": "f4"}
    return np.dtype(types[image.format])


def _by_pillow(stream: BinaryIO) -> Pixels:
    """Read all pixels of a file that libvips cannot read, upright; of a palette the numbers."""
    magic = stream.read(8)
    stream.seek(0)
    reader = next(reader for start, reader in READERS.items() if magic.startswith(start))
    if reader is PngImageFile:
        stream = without_texts(stream, whole=True).stream
    try:
        image: Image.Image = reader(stream)
        image.load()
    except DAMAGE as error:
        raise BadInput(code_of(error), f"the pixels cannot be read: {error}") from error
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8) * 255
    if image.has_transparency_data:
        image = image.convert("RGBA")
    if image.mode not in ("P", "L", "LA", "RGB", "RGBA", "I;16", "I;16B", "I;16L", "I;16N"):
        raise BadInput("unsupported_mode", f"a mask of Pillow's mode {image.mode}; save it as gray")
    return np.asarray(image)
