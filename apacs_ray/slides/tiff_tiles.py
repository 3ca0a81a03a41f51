"""The encoded tiles (or strips) of one TIFF image, decoded strictly: damage is an error, never a picture.

`data.streams` decodes the streams. What has no checksum cannot be judged by any decoder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from apacs_ray.data.grid import Box
from apacs_ray.data.streams import decode_jpeg, inflate, joined_jpeg, jpeg_size, unpack_bits

Pixels = npt.NDArray[np.uint8]
Alpha = Literal["", "straight", "associated"]

STRICTLY_DECODED = {"NONE", "JPEG", "ADOBE_DEFLATE", "DEFLATE", "PACKBITS"}  # compressions that are decoded here
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
        """Return where in `offsets` the tile is: one place, or one for each plane."""
        place = row * self.across + column
        return [plane * self.across * self.down + place for plane in range(self.samples if self.planar else 1)]

    def is_sparse(self, column: int, row: int) -> bool:
        """Tell whether the file says that it holds nothing there."""
        return all(self.sizes[place] == 0 for place in self.places(column, row))

    def holes(self, x: int, y: int, width: int, height: int) -> Iterator[Box]:
        """Yield the sparse tiles that a rectangle touches, px of this image."""
        if self.sizes.all():
            return
        for row in range(max(y // self.tile_height, 0), min(-(-(y + height) // self.tile_height), self.down)):
            for column in range(max(x // self.tile_width, 0), min(-(-(x + width) // self.tile_width), self.across)):
                if self.is_sparse(column, row):
                    yield Box(column * self.tile_width, row * self.tile_height, self.tile_width, self.tile_height)

    def read(self, file: int, column: int, row: int) -> Pixels:
        """Decode a tile of an open file: (height, width, samples) uint8. Raises ValueError when it is damaged."""
        planes = [self._decode(_bytes_at(file, self.offsets[p], self.sizes[p]), row) for p in self.places(column, row)]
        return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)

    def header_fits(self, file: int, column: int, row: int) -> bool:
        """Tell whether a JPEG tile begins as a JPEG stream of the tile's size; other streams say nothing: True."""
        if self.compression != "JPEG":
            return True
        for place in self.places(column, row):
            try:
                stream = self._whole(_bytes_at(file, self.offsets[place], self.sizes[place]))
                fits = jpeg_size(stream) == (self._rows(row), self.tile_width)
            except ValueError:
                return False
            if not fits:
                return False
        return True

    def _rows(self, row: int) -> int:
        """Return the height of a tile; of the last strip what is left."""
        return min(self.tile_height, self.height - row * self.tile_height) if self.strips else self.tile_height

    def _decode(self, stream: bytes, row: int) -> Pixels:
        depth = 1 if self.planar else self.samples
        height, width = self._rows(row), self.tile_width
        if self.compression == "JPEG":
            return self._jpeg(stream, height, width, depth)
        size = height * width * depth
        content = {"NONE": _plain, "PACKBITS": unpack_bits}.get(self.compression, inflate)(stream, size)
        pixels = np.frombuffer(content, np.uint8).reshape(height, width, depth)
        return np.add.accumulate(pixels, axis=1, dtype=np.uint8) if self.predictor == 2 else pixels

    def _jpeg(self, stream: bytes, height: int, width: int, depth: int) -> Pixels:
        whole = self._whole(stream)
        size = jpeg_size(whole)
        if size != (height, width):  # checked before memory is allocated for that size
            raise ValueError(f"it measures {size[1]} x {size[0]} px")
        return decode_jpeg(whole, "RGB" if depth == 3 else "GRAY")

    def _whole(self, stream: bytes) -> bytes:
        """Return a tile's JPEG stream with its tables and color space, which stand in the TIFF's tags."""
        adobe = b"" if self.samples == 1 or self.planar else ADOBE_YCC if self.photometric == "YCBCR" else ADOBE_RGB
        return joined_jpeg(stream, self.tables, adobe)


def _bytes_at(file: int, offset: int, size: int) -> bytes:
    if not 0 <= offset <= os.fstat(file).st_size - size:  # checked before memory is allocated for it
        raise ValueError("the file ends before it")
    return os.pread(file, int(size), int(offset))


def _plain(stream: bytes, size: int) -> bytes:
    if len(stream) < size:
        raise ValueError(f"{len(stream)} of {size} bytes")
    return stream[:size]
