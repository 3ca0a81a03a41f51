"""The header of an image file: what it is, how large, and what is refused before any pixel is read.

JPEG, PNG, TIFF and BMP files are told apart by their first bytes, never by their names. Every defect of a file is a
`BadInput`; trouble of the store under a stream is raised as it is, since it says nothing about the file.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from PIL import Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from apacs_ray.data.png import without_texts
from apacs_ray.errors import BadInput

# Opened through their classes: Image.open applies Pillow's own process-wide pixel limit, partly as a warning.
READERS: dict[bytes, type[ImageFile.ImageFile]] = {
    b"\xff\xd8\xff": JpegImageFile,
    b"\x89PNG\r\n\x1a\n": PngImageFile,
    b"II*\0": TiffImageFile,
    b"MM\0*": TiffImageFile,
    b"II+\0": TiffImageFile,
    b"MM\0+": TiffImageFile,
    b"BM": BmpImageFile,
}
# Everything that Pillow raises about a damaged file.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
COLOR_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
DEEP_MODES = {"I;16", "I;16B", "I;16L", "I;16N"}  # 16-bit gray
# TIFF and EXIF tags
BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION, MAX_SAMPLE_VALUE, TILE_WIDTH, TILE_LENGTH = 258, 262, 274, 281, 322, 323
SWAPS_SIDES = {5, 6, 7, 8}
CUT_SHORT = (
    "truncated",
    "premature end",
    "unexpected end",
    "not large enough",
    "not enough image data",
)  # in Pillow's messages
BUFFER = 1 << 16


@dataclass(frozen=True)
class Header:
    """A file whose header was read.

    Attributes:
        image: without pixels yet.
        bits: how many bits of a channel are used; None where the file does not say.
    """

    image: ImageFile.ImageFile
    bits: int | None

    @property
    def white_is_zero(self) -> bool:
        """Whether 0 is the lightest value, as in some TIFFs."""
        return isinstance(self.image, TiffImageFile) and self.image.tag_v2.get(PHOTOMETRIC) == 0


def probe_image(file: BinaryIO, max_pixels: int) -> tuple[int, int]:
    """Read the size of an image from its header alone.

    Args:
        file: can seek and may be remote: some 64 KiB are read. Its own OSErrors pass.
        max_pixels: `data.max_pixels`.

    Returns:
        (width, height) in px with its EXIF orientation applied.

    Raises:
        BadInput: empty_file, unreadable, truncated, too_large, multiple_frames, unsupported_mode.
    """
    image = read_header(cast(BinaryIO, io.BufferedReader(_Guarded(file), BUFFER)), max_pixels).image
    width, height = image.size
    return (height, width) if turn_of(image) in SWAPS_SIDES else (width, height)


def read_header(stream: BinaryIO, max_pixels: int, *, whole: bool = False) -> Header:
    """Open an image file, not its pixels, and refuse what its header already rules out.

    Args:
        stream: can seek. Its own OSErrors pass.
        max_pixels: `data.max_pixels`.
        whole: the pixels are read later.

    Returns:
        The open file.

    Raises:
        BadInput: as `probe_image`.
    """
    profile: bytes | None = None
    bits: int | None = None
    try:
        magic = stream.read(8)
        if not magic:
            raise BadInput("empty_file", "the file has no bytes")
        reader = next((READERS[start] for start in READERS if magic.startswith(start)), None)
        if reader is None:
            raise BadInput("unreadable", f"not a JPEG, PNG, TIFF or BMP file (it begins with {magic!r})")
        stream.seek(0)
        if reader is PngImageFile:
            png = without_texts(stream, whole=whole)
            stream, profile, bits = png.stream, png.profile, png.bits
        image = reader(stream)
        frames = int(getattr(image, "n_frames", 1))
    except _StoreTroubleError as trouble:
        cause = cast(OSError, trouble.__cause__)
        raise cause from None
    except DAMAGE as error:
        code = "unsupported_mode" if "unknown pixel mode" in str(error) else code_of(error)
        raise BadInput(code, f"the header cannot be read: {text_of(error)}") from error
    _require_usable(image, frames, max_pixels)
    if profile is not None:
        image.info["icc_profile"] = profile
    return Header(image, _significant_bits(image) if isinstance(image, TiffImageFile) else bits)


def _require_usable(image: ImageFile.ImageFile, frames: int, max_pixels: int) -> None:
    width, height = image.size
    if isinstance(image, TiffImageFile):  # a small image may be stored in enormous tiles
        tile = int(image.tag_v2.get(TILE_WIDTH, 0)), int(image.tag_v2.get(TILE_LENGTH, 0))
        width, height = max((width, height), tile, key=lambda size: size[0] * size[1])
    if width * height > max_pixels:
        raise BadInput("too_large", f"{width} x {height} px exceed data.max_pixels ({max_pixels})")
    if frames > 1:
        raise BadInput("multiple_frames", f"the file holds {frames} images; save the one that is meant")
    if image.mode not in COLOR_MODES | DEEP_MODES:
        raise BadInput("unsupported_mode", f"pixels of Pillow's mode {image.mode}; save them with 8 bits a channel")


def turn_of(image: ImageFile.ImageFile) -> int:
    """Return the EXIF orientation 1..8 that is still to be applied, as the header gives it."""
    if isinstance(image, TiffImageFile) or (isinstance(image, PngImageFile) and "exif" not in image.info):
        return 1  # Pillow turns TIFF itself; further EXIF data of a PNG would cost reading its pixels
    try:
        turn = image.getexif().get(ORIENTATION, 1)
    except DAMAGE:  # damaged EXIF data of a good image
        return 1
    return turn if turn in range(1, 9) else 1


def code_of(error: BaseException) -> str:
    """Return the code of a decoder's complaint: truncated or unreadable."""
    text = str(error).lower()
    return "truncated" if isinstance(error, EOFError) or any(part in text for part in CUT_SHORT) else "unreadable"


def text_of(error: BaseException) -> str:
    """Return what an error says, or what it is called."""
    return str(error) or type(error).__name__


def _significant_bits(image: TiffImageFile) -> int | None:
    """Return how many bits of a channel a TIFF says it uses."""
    try:
        stated = image.tag_v2.get(MAX_SAMPLE_VALUE, 0)
        top = max(stated) if isinstance(stated, tuple) else int(stated)
        stored = image.tag_v2.get(BITS_PER_SAMPLE, (1,))[0]
    except DAMAGE:
        return None
    return top.bit_length() if 0 < top < 1 << stored else int(stored)


class _StoreTroubleError(Exception):
    """An OSError of the stream, kept apart from the OSErrors by which Pillow says that a file is damaged."""


class _Guarded(io.RawIOBase):
    """A stream not read past its end (object stores raise there), whose own errors stay recognizable."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._size = stream.seek(0, io.SEEK_END)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        try:
            self._stream.seek(self._position)
            content = self._stream.read(wanted)
        except OSError as trouble:
            raise _StoreTroubleError from trouble
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
