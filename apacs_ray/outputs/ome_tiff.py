"""A mask or a map of probabilities as a pyramidal OME-TIFF, written from top to bottom in constant memory.

Level 0 goes straight into the file. The lower levels come about beside it, band by band, and wait encoded in temporary
files, since a TIFF of this kind has its levels one after the other.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any
from xml.sax.saxutils import quoteattr

import numpy as np
import numpy.typing as npt
import tifffile

TILE = 512  # px
ZLIB_LEVEL = 6
COLUMNS = 2048  # px of a lower level that are worked out at a time
UM_PER_CM = 1e4
_LENGTH = struct.Struct("<I")
_NOT_XML = dict.fromkeys((*range(0x20), *range(0xD800, 0xE000), 0xFFFE, 0xFFFF), "\ufffd")

Band = npt.NDArray[np.uint8]  # (rows, width)


def write_pyramid(
    path: Path,
    bands: Iterable[Band],
    *,
    width: int,
    height: int,
    mpp: float | None,
    name: str,
    uuid: str,
    average: bool = False,
) -> None:
    """Write an image of 8 bits and one channel with its levels, each half as large, until one fits a tile.

    Equal pixels and names give equal bytes. When this fails, no file is left.

    Args:
        path: of the file; temporary files with what its lower levels take lie beside it meanwhile.
        bands: the image from top to bottom, (512, width) uint8 each, the last one as high as what is left.
        width: of the image, px.
        height: of the image, px.
        mpp: um per px of this image, None where it is unknown.
        name: of the image, as viewers show it.
        uuid: of the file.
        average: a pixel of a lower level is the mean of the (up to four) it stands for. Otherwise this is a mask of
            0 and 255, and the pixel is 255 where at least half of them are.

    Raises:
        ValueError: the bands are not those of such an image.
    """
    if min(width, height) < 1:
        raise ValueError(f"{path}: an image of {width} x {height} px; both must be at least 1")
    sizes = level_sizes(width, height)
    side = tile_side(width, height)
    rest = _checked(path, bands, width, height, is_mask=not average)
    extent = None if mpp is None else (width * mpp, height * mpp)
    xml = ome_xml(width, height, mpp, name, uuid).encode()
    try:
        with (
            contextlib.ExitStack() as files,
            tifffile.TiffWriter(path, bigtiff=True, byteorder="<", ome=False, shaped=False) as tiff,
        ):
            spools = [files.enter_context(tempfile.TemporaryFile(dir=path.parent)) for _ in sizes[1:]]
            tiles = _top_tiles(rest, side, _Reduced.chain(sizes, spools, average))
            full = {"subfiletype": 0, "subifds": len(spools), "description": xml}
            _write_level(tiff, tiles, sizes[0], side, extent, full)
            for _ in rest:  # `_checked` refuses what is too much
                pass
            for size, spool in zip(sizes[1:], spools, strict=True):
                _write_level(tiff, _spooled(spool), size, side, extent, {"subfiletype": 1})
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def level_sizes(width: int, height: int) -> list[tuple[int, int]]:
    """Return width and height of each level, px: halved and rounded up, so that no pixel is lost."""
    sizes = [(width, height)]
    while max(sizes[-1]) > TILE:
        width, height = (width + 1) // 2, (height + 1) // 2
        sizes.append((width, height))
    return sizes


def tile_side(width: int, height: int) -> int:
    """Return the sides of the tiles, px: smaller than usual where one holds the image, as libvips refuses much more."""
    return min(TILE, -(-max(width, height) // 16) * 16)


def halve(band: Band, average: bool, half: Band) -> None:
    """Write a band of the next level to `half`, (rows / 2, width / 2) rounded up."""
    for left in range(0, half.shape[1], COLUMNS):  # sums take four times the memory of what they are of
        part, target = band[:, 2 * left : 2 * (left + COLUMNS)], half[:, left : left + COLUMNS]
        if not part.any():
            target[:] = 0
            continue
        rows, columns = part.shape
        if rows % 2 or columns % 2:  # a doubled edge leaves the shares of the pixels that are there as they are
            part = np.pad(part, ((0, rows % 2), (0, columns % 2)), mode="edge")
        pairs = part[0::2].astype(np.uint16) + part[1::2]
        sums = pairs[:, 0::2] + pairs[:, 1::2]
        target[:] = (sums + 2) >> 2 if average else (sums >= 2 * 255) * np.uint8(255)


def ome_xml(width: int, height: int, mpp: float | None, name: str, uuid: str) -> str:
    """Return the OME-XML of an image of 8 bits and one channel."""
    size = "".join(f' PhysicalSize{axis}="{mpp!r}" PhysicalSize{axis}Unit="µm"' for axis in "XY" if mpp is not None)
    schema = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    return (
        '<?xml version="1.0" encoding="UTF-8"?>'
        f'<OME xmlns="{schema}" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
        f'xsi:schemaLocation="{schema} {schema}/ome.xsd" UUID="urn:uuid:{uuid}">'
        f'<Image ID="Image:0" Name={quoteattr(name.translate(_NOT_XML))}>'
        '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SignificantBits="8" BigEndian="false" '
        f'SizeX="{width}" SizeY="{height}" SizeC="1" SizeZ="1" SizeT="1"{size}>'
        '<Channel ID="Channel:0:0" SamplesPerPixel="1"/><TiffData IFD="0" PlaneCount="1"/>'
        "</Pixels></Image></OME>"
    )


class _Reduced:
    """A lower level: rows of the level above come in, encoded tiles go to its file, full bands to the level below."""

    def __init__(self, size: tuple[int, int], spool: IO[bytes], average: bool, below: _Reduced | None) -> None:
        width, self._left = size
        self._spool, self._average, self._below = spool, average, below
        self._band = np.empty((min(TILE, self._left), width), np.uint8)
        self._rows = 0  # of the band that are there

    @classmethod
    def chain(cls, sizes: Sequence[tuple[int, int]], spools: Sequence[IO[bytes]], average: bool) -> _Reduced | None:
        """Return the first of the lower levels, None where there is none."""
        level = None
        for size, spool in reversed(list(zip(sizes[1:], spools, strict=True))):
            level = cls(size, spool, average, level)
        return level

    def take(self, above: Band) -> None:
        """Take the next band of the level above."""
        rows = -(-len(above) // 2)
        halve(above, self._average, self._band[self._rows : self._rows + rows])
        self._rows += rows
        self._left -= rows
        if self._left and self._rows < TILE:
            return
        band, self._rows = self._band[: self._rows], 0
        for tile in _encoded(band):
            self._spool.write(_LENGTH.pack(len(tile)) + tile)
        if self._below is not None:
            self._below.take(band)


def _top_tiles(bands: Iterator[Band], side: int, below: _Reduced | None) -> Iterator[bytes]:
    """Yield the tiles of level 0, each band of them after the levels below have it: nobody asks after the last tile."""
    for band in bands:
        if below is not None:
            below.take(band)
        yield from _encoded(band, side)
        del band  # before the next one is made


def _spooled(spool: IO[bytes]) -> Iterator[bytes]:
    spool.seek(0)
    while head := spool.read(_LENGTH.size):
        yield spool.read(*_LENGTH.unpack(head))


def _encoded(band: Band, side: int = TILE) -> Iterator[bytes]:
    for left in range(0, band.shape[1], side):
        tile = band[:, left : left + side]
        if not tile.any():
            yield _empty_tile(side)
            continue
        if tile.shape != (side, side):
            tile = np.pad(tile, ((0, side - tile.shape[0]), (0, side - tile.shape[1])))
        yield zlib.compress(tile.tobytes(), ZLIB_LEVEL)


@functools.cache
def _empty_tile(side: int) -> bytes:
    return zlib.compress(bytes(side * side), ZLIB_LEVEL)


def _checked(path: Path, bands: Iterable[Band], width: int, height: int, *, is_mask: bool) -> Iterator[Band]:
    """Yield the bands. Raises ValueError when they are not those of the image."""
    bands = iter(bands)
    for top in range(0, height, TILE):
        expected = (min(TILE, height - top), width)
        band = next(bands, None)
        if band is None:
            raise ValueError(f"{path}: the bands end at row {top} of {height}")
        if band.shape != expected or band.dtype != np.uint8:
            raise ValueError(f"{path}: a band of {band.shape} {band.dtype} at row {top}; {expected} uint8 is needed")
        if is_mask and any((band[row] + np.uint8(1)).max() > 1 for row in range(len(band))):  # 255 becomes 0, 0 1
            raise ValueError(f"{path}: a mask has values other than 0 and 255 from row {top} on")
        yield band
        del band
    if next(bands, None) is not None:
        raise ValueError(f"{path}: there are more bands than {height} rows need")


def _write_level(
    tiff: tifffile.TiffWriter,
    tiles: Iterator[bytes],
    size: tuple[int, int],
    side: int,
    extent: tuple[float, float] | None,
    options: dict[str, Any],
) -> None:
    """Write a level; `extent` is the image's width and height in um."""
    if extent is not None:
        px_per_cm = tuple(UM_PER_CM * px / um for px, um in zip(size, extent, strict=True))
        options = options | {"resolution": px_per_cm, "resolutionunit": "CENTIMETER"}
    tiff.write(
        tiles,
        shape=size[::-1],
        dtype=np.uint8,
        photometric="MINISBLACK",
        tile=(side, side),
        compression="ADOBE_DEFLATE",
        metadata=None,
        software=False,
        **options,
    )
