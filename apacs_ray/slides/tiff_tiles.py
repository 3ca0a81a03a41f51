"""The encoded tiles (or strips) of one TIFF image, decoded strictly: damage is an error, never a picture.

libtiff and libvips pass over damage within a JPEG stream without a word, and over a wrong checksum of Deflate. So
JPEG is decoded by libjpeg-turbo itself (which is faster, too), Deflate by zlib, and PackBits here, where the length
says whether a stream is whole. What has no checksum cannot be judged by any decoder.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg

from apacs_ray.data.tiles import Box

Pixels = npt.NDArray[np.uint8]
Alpha = Literal["", "straight", "associated"]

STRICT = {"NONE", "JPEG", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS"}  # decoded here
SOI = b"\xff\xd8"
ADOBE_RGB, ADOBE_YCC = (b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([kind]) for kind in (0, 1))


@dataclass(frozen=True)
class TiffTiles:
    """One image of a TIFF: where its tiles lie and how they are encoded. A strip is a tile of the image's width.

    `page` and `subifd` name it for libvips. With `planar` each plane has tiles of its own, one after the other.
    """

    page: int
    subifd: int | None
    width: int
    height: int
    tile_width: int
    tile_height: int
    samples: int
    planar: bool
    strips: bool
    compression: str
    photometric: str
    predictor: int
    tables: bytes
    alpha: Alpha
    palette: npt.NDArray[np.uint8] | None  # (256, 3)
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    @property
    def across(self) -> int:
        """Tiles in a row."""
        return -(-self.width // self.tile_width)

    @property
    def down(self) -> int:
        """Rows of tiles."""
        return -(-self.height // self.tile_height)

    def places(self, column: int, row: int) -> list[int]:
        """Where in `offsets` the tile is: one place, or one for each plane."""
        place = row * self.across + column
        return [plane * self.across * self.down + place for plane in range(self.samples if self.planar else 1)]

    def is_sparse(self, column: int, row: int) -> bool:
        """Whether the file says that it holds nothing there."""
        return all(self.sizes[place] == 0 for place in self.places(column, row))

    def holes(self, x: int, y: int, width: int, height: int) -> Iterator[Box]:
        """The sparse tiles that a rectangle touches, px of this image."""
        if self.sizes.all():
            return
        for row in range(max(y // self.tile_height, 0), min(-(-(y + height) // self.tile_height), self.down)):
            for column in range(max(x // self.tile_width, 0), min(-(-(x + width) // self.tile_width), self.across)):
                if self.is_sparse(column, row):
                    yield Box(column * self.tile_width, row * self.tile_height, self.tile_width, self.tile_height)

    def read(self, file: int, column: int, row: int) -> Pixels:
        """(height, width, samples) of a tile, of an open file. Raises ValueError when its stream is damaged."""
        planes = [self._decode(_bytes_at(file, self.offsets[p], self.sizes[p]), row) for p in self.places(column, row)]
        return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)

    def header_fits(self, file: int, column: int, row: int) -> bool:
        """Whether a JPEG tile begins as a JPEG stream of the tile's size; other streams say nothing of themselves."""
        if self.compression != "JPEG":
            return True
        for place in self.places(column, row):
            try:
                stream = self._whole(_bytes_at(file, self.offsets[place], self.sizes[place]))
                height, width, *_ = simplejpeg.decode_jpeg_header(stream)
            except ValueError:
                return False
            if (height, width) != (self._rows(row), self.tile_width):
                return False
        return True

    def _rows(self, row: int) -> int:
        """Height of a tile; of the last strip what is left."""
        return min(self.tile_height, self.height - row * self.tile_height) if self.strips else self.tile_height

    def _decode(self, stream: bytes, row: int) -> Pixels:
        depth = 1 if self.planar else self.samples
        height, width = self._rows(row), self.tile_width
        if self.compression == "JPEG":
            return self._jpeg(stream, height, width, depth)
        size = height * width * depth
        content = {"NONE": _plain, "PACKBITS": unpack_bits}.get(self.compression, _inflate)(stream, size)
        pixels = np.frombuffer(content, np.uint8).reshape(height, width, depth)
        return np.add.accumulate(pixels, axis=1, dtype=np.uint8) if self.predictor == 2 else pixels

    def _jpeg(self, stream: bytes, height: int, width: int, depth: int) -> Pixels:
        whole = self._whole(stream)
        found = simplejpeg.decode_jpeg_header(whole)
        if found[:2] != (height, width):  # before memory is taken for what it says it is
            raise ValueError(f"it measures {found[1]} x {found[0]} px")
        colorspace = "RGB" if depth == 3 else "GRAY"
        pixels: Pixels = simplejpeg.decode_jpeg(whole, colorspace=colorspace, strict=True)
        return pixels

    def _whole(self, stream: bytes) -> bytes:
        """The tables and the color space of an abbreviated stream stand in the TIFF's tags."""
        adobe = b"" if self.samples == 1 or self.planar else ADOBE_YCC if self.photometric == "YCBCR" else ADOBE_RGB
        return SOI + adobe + self.tables[2:-2] + stream[2:]


def _bytes_at(file: int, offset: int, size: int) -> bytes:
    if not 0 <= offset <= os.fstat(file).st_size - size:  # or memory is taken for what is not there
        raise ValueError("the file ends before it")
    return os.pread(file, int(size), int(offset))


def _plain(stream: bytes, size: int) -> bytes:
    if len(stream) < size:
        raise ValueError(f"{len(stream)} of {size} bytes")
    return stream[:size]


def _inflate(stream: bytes, size: int) -> bytes:
    """Deflate, to its end: the checksum stands there."""
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(stream, 2 * size + 64)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not inflater.eof or len(content) < size:
        raise ValueError(f"its Deflate stream does not end as it should ({len(content)} of {size} bytes)")
    return content[:size]


def unpack_bits(stream: bytes, size: int) -> bytes:
    """PackBits: runs (257 - n, a byte) and literals (n - 1, n bytes). Raises ValueError unless `size` bytes come."""
    content = bytearray()
    place = 0
    while place < len(stream) and len(content) < size:
        head = stream[place]
        if head < 128:
            content += stream[place + 1 : place + 2 + head]
            place += 2 + head
        elif head > 128:
            content += stream[place + 1 : place + 2] * (257 - head)
            place += 2
        else:  # nothing, by the specification
            place += 1
    if len(content) != size or place > len(stream):
        raise ValueError(f"its PackBits stream gives {len(content)} of {size} bytes")
    return bytes(content)
