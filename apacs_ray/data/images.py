"""Source images: their headers, their pixels, and how tiles are encoded. Masks are read by `apacs_ray.data.masks`.

JPEG, PNG, TIFF and BMP files are told apart by their first bytes, never by their names. Every defect of a
file is a `BadInput`; trouble of the store under a stream is raised as it is, since it says nothing about the
file.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageCms, ImageFile, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from apacs_ray.data.png import without_texts
from apacs_ray.errors import BadInput

Rgb = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

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
DARK = 1 << 14  # no photograph in 16 bits ends below: a camera's 10, 12 or 14 bits do
SWAPS_SIDES = {5, 6, 7, 8}
CUT_SHORT = (
    "truncated",
    "premature end",
    "unexpected end",
    "not large enough",
    "not enough image data",
)  # in Pillow's messages
PADDING = re.compile(r": [1-4] extraneous bytes before marker 0xd9$")  # in libjpeg-turbo's messages
BUFFER = 1 << 16
# Pillow gives a picture's memory back to the system, and the next one's is cleared page by page: a tenth of a tile's
# time. So many blocks of 16 MiB are kept instead.
Image.core.set_blocks_max(4)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Header:
    """A file whose header was read: `image` has no pixels yet, `bits` of a channel are used (None: not told)."""

    image: ImageFile.ImageFile
    bits: int | None

    @property
    def white_is_zero(self) -> bool:
        return isinstance(self.image, TiffImageFile) and self.image.tag_v2.get(PHOTOMETRIC) == 0


def probe_image(file: BinaryIO, max_pixels: int) -> tuple[int, int]:
    """(width, height) in px of an image with its EXIF orientation applied, from its header alone.

    `file` can seek and may be remote: some 64 KiB are read. Raises BadInput: empty_file, unreadable,
    truncated, too_large, multiple_frames, unsupported_mode. An OSError of `file` itself passes.
    """
    image = read_header(cast(BinaryIO, io.BufferedReader(_Guarded(file), BUFFER)), max_pixels).image
    width, height = image.size
    return (height, width) if turn_of(image) in SWAPS_SIDES else (width, height)


def decode_image(data: bytes, max_pixels: int) -> Rgb:
    """An image file as 8-bit sRGB, (H, W, 3) uint8 0..255, with its EXIF orientation applied.

    Of 16 bits the upper byte is kept, of the 10, 12 or 14 bits of a camera that the file tells the upper eight, and
    values up to 255 are what they are; transparency is laid on white; an embedded ICC profile is converted to sRGB, and
    one that is broken or meant for another kind of pixels is passed over, as viewers do. Raises BadInput: as
    `probe_image`, and too_dark for 16 bits of which the upper ones are not used.
    """
    header = read_header(io.BytesIO(data), max_pixels, whole=True)
    if isinstance(header.image, JpegImageFile):
        _require_sound_jpeg(data)
    image = _loaded(header.image)
    profile = image.info.get("icc_profile")
    if image.mode in DEEP_MODES:
        image = Image.fromarray(_upper_byte(np.asarray(image), header.bits, header.white_is_zero))
    alpha: Image.Image | None = None
    if image.has_transparency_data:
        image = _straight(image)
        alpha = image.getchannel("A")
    colors = _to_srgb(image, profile)
    if alpha is not None:
        white = Image.new("RGB", colors.size, (255, 255, 255))
        white.paste(colors, mask=alpha)
        colors = white
    return np.array(colors)


def _require_sound_jpeg(data: bytes) -> None:
    """Raise BadInput (truncated, unreadable) for damage within a JPEG stream, over which Pillow passes in silence.

    What libjpeg-turbo cannot judge is left to Pillow. A few bytes between the pixels and the end of the file are a
    camera's padding; many are pixels that a decoder that lost its way did not reach.
    """
    try:
        simplejpeg.decode_jpeg(data, colorspace="GRAY", strict=True)
    except ValueError as error:
        words = str(error)
        if words.startswith(("Corrupt JPEG", "Premature end")) and not PADDING.search(words):
            raise BadInput(code_of(error), f"the pixels cannot be read: {words}") from error


def encode_image(
    rgb: Rgb | Image.Image,
    image_format: Literal["jpeg", "png", "webp"],
    quality: int,
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"],
) -> bytes:
    """(H, W, 3) uint8 sRGB as the bytes of a file; equal pixels give equal bytes with equal library versions.

    `quality` (1..100) and the chroma `subsampling` are JPEG's; PNG and WebP are lossless. WebP holds 16383 px
    a side.
    """
    options: dict[str, dict[str, Any]] = {
        "jpeg": {"quality": quality, "subsampling": subsampling},
        "png": {"compress_level": 3},
        "webp": {"lossless": True, "quality": 50, "method": 2},
    }
    sink = io.BytesIO()
    as_picture(rgb).save(sink, image_format, **options[image_format])
    return sink.getvalue()


def as_picture(pixels: npt.NDArray[Any] | Image.Image, order: str = "RGB") -> Image.Image:
    """Pixels as an RGB picture of Pillow's, as they are when they are one already: each way back and forth is a copy.

    `pixels` (H, W, 3) uint8, or whatever `order` names (BGRX: (H, W) uint32 or (H, W, 4) uint8).
    """
    if isinstance(pixels, Image.Image):
        return pixels
    height, width = pixels.shape[:2]
    picture = Image.new("RGB", (width, height), None)  # not filled first
    content: Any = memoryview(np.ascontiguousarray(pixels)).cast("B")  # type: ignore[arg-type]
    picture.frombytes(content, "raw", order)
    return picture


def encode_mask(mask: Mask) -> bytes:
    """(H, W) bool as the bytes of a 1-bit PNG, cells white."""
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(mask)).save(sink, "png")
    return sink.getvalue()


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


def read_header(stream: BinaryIO, max_pixels: int, *, whole: bool = False) -> Header:
    """Open a file, not its pixels, and refuse what its header already rules out; `whole` where they are read later."""
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
        raise cast(OSError, trouble.__cause__) from None
    except DAMAGE as error:
        code = "unsupported_mode" if "unknown pixel mode" in str(error) else code_of(error)
        raise BadInput(code, f"the header cannot be read: {_text_of(error)}") from error
    _require_usable(image, frames, max_pixels)
    if profile is not None:
        image.info["icc_profile"] = profile
    return Header(image, _significant_bits(image) if isinstance(image, TiffImageFile) else bits)


def _require_usable(image: ImageFile.ImageFile, frames: int, max_pixels: int) -> None:
    width, height = image.size
    if isinstance(image, TiffImageFile):  # a small image may lie in tiles that are enormous
        tile = int(image.tag_v2.get(TILE_WIDTH, 0)), int(image.tag_v2.get(TILE_LENGTH, 0))
        width, height = max((width, height), tile, key=lambda size: size[0] * size[1])
    if width * height > max_pixels:
        raise BadInput("too_large", f"{width} x {height} px exceed data.max_pixels ({max_pixels})")
    if frames > 1:
        raise BadInput("multiple_frames", f"the file holds {frames} images; save the one that is meant")
    if image.mode not in COLOR_MODES | DEEP_MODES:
        raise BadInput("unsupported_mode", f"pixels of Pillow's mode {image.mode}; save them with 8 bits a channel")


def _loaded(image: ImageFile.ImageFile) -> Image.Image:
    """The pixels of a file whose header was read, upright."""
    turn = turn_of(image)
    deep = image.mode not in DEEP_MODES and any(";16" in str(tile) for tile in image.tile)
    try:
        image.load()
    except DAMAGE as error:
        raise BadInput(code_of(error), f"the pixels cannot be read: {_text_of(error)}") from error
    if deep:  # of colors Pillow keeps the upper bytes
        extrema = cast(tuple[tuple[int, int], ...], image.getextrema())
        tops = [top for (_, top), band in zip(extrema, image.getbands(), strict=True) if band != "A"]
        _require_bright(max(tops) << 8 | 255)
    return image if turn == 1 else ImageOps.exif_transpose(image)


def turn_of(image: ImageFile.ImageFile) -> int:
    """EXIF orientation 1..8 that is still to be applied, as the header gives it."""
    if isinstance(image, TiffImageFile) or (isinstance(image, PngImageFile) and "exif" not in image.info):
        return 1  # Pillow turns TIFF itself; to look further in a PNG it would read all pixels
    try:
        turn = image.getexif().get(ORIENTATION, 1)
    except DAMAGE:  # damaged EXIF data of a good image
        return 1
    return turn if turn in range(1, 9) else 1


def code_of(error: BaseException) -> str:
    """The code of a decoder's complaint: truncated or unreadable."""
    text = str(error).lower()
    return "truncated" if isinstance(error, EOFError) or any(part in text for part in CUT_SHORT) else "unreadable"


def _text_of(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _significant_bits(image: TiffImageFile) -> int | None:
    """How many bits of a channel a TIFF says it uses."""
    try:
        told = image.tag_v2.get(MAX_SAMPLE_VALUE, 0)
        top = max(told) if isinstance(told, tuple) else int(told)
        stored = image.tag_v2.get(BITS_PER_SAMPLE, (1,))[0]
    except DAMAGE:
        return None
    return top.bit_length() if 0 < top < 1 << stored else int(stored)


def _upper_byte(values: npt.NDArray[np.uint16], bits: int | None, white_is_zero: bool) -> npt.NDArray[np.uint8]:
    """The upper eight of the bits that 16-bit gray uses, which is decided for the whole image."""
    top = int(values.max())
    if bits is None or not 8 <= bits < 16 or top >> bits:
        bits = 8 if top <= 255 and not white_is_zero else 16  # bytes that were saved with 16 bits
    if white_is_zero:
        values = np.uint16((1 << bits) - 1) - values
    if bits == 16:
        _require_bright(int(values.max()))
    return (values >> (bits - 8)).astype(np.uint8)


def _require_bright(top: int) -> None:
    if top < DARK:
        raise BadInput(
            "too_dark",
            f"its 16-bit values end at {top}, as of a camera of {max(top.bit_length(), 10)} bits; save it with 8 bits",
        )


def _straight(image: Image.Image) -> Image.Image:
    """RGBA whose colors are not multiplied by their alpha."""
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        return image.convert("RGB")
    colors = image if image.mode in ("L", "RGB", "CMYK") else image.convert("L" if image.mode == "1" else "RGB")
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image.convert("RGB")  # exactly as stored: a conversion onto itself would round
        converted = ImageCms.profileToProfile(colors, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, *DAMAGE):
        return image.convert("RGB")
    return cast(Image.Image, converted)
