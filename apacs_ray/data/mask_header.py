"""The header of a mask file: how the mask is stored, and what is refused for that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import tifffile
from PIL.ImagePalette import ImagePalette
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from apacs_ray.data.image_header import DAMAGE, ORIENTATION, READERS, SWAPS_SIDES, read_header, turn_of
from apacs_ray.errors import BadInput

Palette = npt.NDArray[np.int64]  # (colors, 3), 0..255
MAX_TILE = 1 << 26  # px of one tile, which is decoded as a whole
MAX_PAGES = 1000
BY_VIPS = {"NONE", "LZW", "DEFLATE", "ADOBE_DEFLATE", "PACKBITS", "JPEG", "WEBP", "CCITTRLE", "CCITTFAX3", "CCITTFAX4"}
BY_PILLOW = {"ZSTD", "LZMA"}
LOSSY = {"JPEG", "WEBP"}
PHOTOMETRICS = {"MINISWHITE", "MINISBLACK", "RGB", "PALETTE", "YCBCR"}


@dataclass(frozen=True)
class Stored:
    """The way in which a mask is stored.

    Attributes:
        width: px, before its orientation is applied.
        height: px, before its orientation is applied.
        orientation: EXIF's, 1..8.
        palette: of its colors, if it has one.
        lossy: its pixels are not exact.
        by_pillow: libvips does not read it.
        tile: (width, height) px of its tiles, if it has some.
        compression: of a TIFF tifffile's name, else the format.
        offsets: of a TIFF's tiles or strips.
        sizes: bytes of each.
        tables: of its JPEG streams.
    """

    width: int
    height: int
    orientation: int = 1
    palette: Palette | None = None
    lossy: bool = False
    by_pillow: bool = False
    tile: tuple[int, int] | None = None
    compression: str = ""
    offsets: tuple[int, ...] = ()  # of a TIFF's tiles or strips
    sizes: tuple[int, ...] = ()  # bytes of each
    tables: bytes = b""  # of its JPEG streams


def read_stored(stream: BinaryIO, max_pixels: int) -> Stored:
    """Read the header of a mask. Raises BadInput: as `MaskFile`."""
    magic = stream.read(8)
    stream.seek(0)
    kind = next((reader for start, reader in READERS.items() if magic.startswith(start)), None)
    if kind is TiffImageFile:
        try:
            with tifffile.TiffFile(stream) as tiff:
                return _stored_tiff(tiff)
        except (tifffile.TiffFileError, *DAMAGE) as error:
            raise BadInput("unreadable", f"the header cannot be read: {error}") from error
    header = read_header(stream, max_pixels).image
    if header.mode in ("CMYK", "YCbCr"):
        raise BadInput("unsupported_mode", f"a mask in {header.mode}; save it as gray")
    indexed = header.mode == "P"
    return Stored(
        *header.size,
        orientation=turn_of(header),
        palette=_table(header.palette) if indexed and header.palette is not None else None,
        lossy=header.format == "JPEG",
        by_pillow=indexed or header.format == "BMP",
        compression="" if isinstance(header, PngImageFile) else str(header.format),
    )


def _table(palette: ImagePalette) -> Palette:
    """Return a palette as the header gives it; to ask Pillow for its colors would read the pixels."""
    order, content = palette.getdata()
    whole = len(content) // len(order) * len(order)
    colors = np.frombuffer(bytes(content[:whole]), np.uint8).reshape(-1, len(order))
    return colors[:, [order.index(channel) for channel in "RGB"]].astype(np.int64)


def _stored_tiff(tiff: tifffile.TiffFile) -> Stored:
    page = _only_page(tiff)
    photometric, compression = _name(page.photometric), _name(page.compression)
    planes = page.planarconfig == 2 and page.samplesperpixel > 1
    by_pillow = compression in BY_PILLOW or planes
    _require_decoder(page, photometric, compression, planes=planes, by_pillow=by_pillow)
    tile = (page.tilewidth, page.tilelength) if page.is_tiled else None
    parts = 1 if tile is None or min(tile) < 1 else -(-page.imagewidth // tile[0]) * -(-page.imagelength // tile[1])
    if len(page.dataoffsets) != len(page.databytecounts) or len(page.dataoffsets) < parts or min(tile or (1,)) < 1:
        raise BadInput("unreadable", "the header does not say where its pixels lie")
    if tile is not None and tile[0] * tile[1] > MAX_TILE:
        raise BadInput("too_large", f"in tiles of {tile[0]} x {tile[1]} px; {MAX_TILE} px are the limit")
    turn = int(page.tags.valueof(ORIENTATION, 1))
    width, height = page.imagewidth, page.imagelength
    if by_pillow:  # Pillow applies the orientation itself
        turn, width, height = 1, *((height, width) if turn in SWAPS_SIDES else (width, height))
    return Stored(
        width,
        height,
        orientation=turn if turn in range(1, 9) else 1,
        palette=_colormap(page) if photometric == "PALETTE" else None,
        lossy=compression in LOSSY,
        by_pillow=by_pillow,
        tile=tile,
        compression=compression,
        offsets=tuple(page.dataoffsets),
        sizes=tuple(page.databytecounts),
        tables=page.jpegtables or b"",
    )


def _require_decoder(page: Any, photometric: str, compression: str, *, planes: bool, by_pillow: bool) -> None:
    """Raise BadInput (unsupported_mode) for what no decoder here reads rightly."""
    bits, kind = page.bitspersample, int(page.sampleformat)
    if photometric not in PHOTOMETRICS or kind not in (1, 2, 3) or not 1 <= page.samplesperpixel <= 4:
        what = f"{page.samplesperpixel} channels of {photometric} (sample format {kind})"
        raise BadInput("unsupported_mode", f"a mask with {what}; save it as gray of 8 or 16 bits")
    if bits not in (1, 2, 4, 8, 16, 32):
        raise BadInput("unsupported_mode", f"a mask with {bits} bits a channel; save it with 8 or 16")
    if compression not in BY_VIPS | BY_PILLOW or (compression.startswith("CCITT") and page.is_tiled):
        # the decoder reports no damage of tiles in CCITT
        where = " in tiles" if page.is_tiled else ""
        raise BadInput("unsupported_mode", f"a mask in {compression}{where}; save it with Deflate or LZW")
    if by_pillow and (bits not in (1, 8, 16) or kind != 1 or (planes and bits != 8)):
        raise BadInput("unsupported_mode", f"a mask in {compression}{' and planes' * planes}; save it with Deflate")
    if photometric == "MINISWHITE" and (bits > 16 or kind != 1 or (by_pillow and bits > 8)):
        raise BadInput("unsupported_mode", f"a mask of {bits} bits in which 0 is white; save it with 0 as black")


def _name(member: Any) -> str:
    return str(getattr(member, "name", member))


def _only_page(tiff: tifffile.TiffFile) -> Any:
    """Return the mask's page: the first; smaller ones are its pyramid."""
    pages: Sequence[Any] = tiff.pages
    if not len(pages):
        raise BadInput("unreadable", "it holds no image")
    if len(pages) > MAX_PAGES:
        raise BadInput("multiple_frames", f"the file holds {len(pages)} images; save the one that is meant")
    first = tiff.pages.first
    if min(first.imagewidth, first.imagelength) < 1:
        raise BadInput("unreadable", f"{first.imagewidth} x {first.imagelength} px")
    images = int((tiff.imagej_metadata or {}).get("images", 1)) * int(first.imagedepth)
    for page in [pages[number] for number in range(1, len(pages))]:
        page = page.aspage()
        if page.imagewidth >= first.imagewidth or page.imagelength >= first.imagelength:
            images = max(images, len(pages))
    if images > 1:
        raise BadInput("multiple_frames", f"the file holds {images} images; save the one that is meant")
    return first


def _colormap(page: Any) -> Palette | None:
    colors = page.colormap
    return None if colors is None else (np.asarray(colors, np.int64).T >> 8)
