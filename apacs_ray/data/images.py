"""Source images and masks: their headers, their pixels, and how tiles are encoded.

JPEG, PNG, TIFF and BMP files are told apart by their first bytes, never by their names. Every defect of a
file is a `BadInput`; trouble of the store under a stream is raised as it is, since it says nothing about the
file.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile, ImageOps
from PIL.BmpImagePlugin import BmpImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

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
COLOUR_MODES = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
DEEP_MODES = {"I;16", "I;16B", "I;16L", "I;16N"}  # 16-bit grey
ORIENTATION, TILE_WIDTH, TILE_LENGTH = 274, 322, 323  # TIFF and EXIF tags
SWAPS_SIDES = {5, 6, 7, 8}
CUT_SHORT = (
    "truncated",
    "unexpected end",
    "not large enough",
    "not enough image data",
)  # in Pillow's messages
BUFFER = 1 << 16


def probe_image(file: BinaryIO, max_pixels: int) -> tuple[int, int]:
    """(width, height) in px of an image or a mask with its EXIF orientation applied, from its header alone.

    `file` can seek and may be remote: some 64 KiB are read. Raises BadInput: empty_file, unreadable,
    truncated, too_large, multiple_frames, unsupported_mode. An OSError of `file` itself passes.
    """
    header = _header(cast(BinaryIO, io.BufferedReader(_Guarded(file), BUFFER)), max_pixels)
    width, height = header.size
    return (height, width) if _turn(header) in SWAPS_SIDES else (width, height)


def decode_image(data: bytes, max_pixels: int) -> Rgb:
    """An image file as 8-bit sRGB, (H, W, 3) uint8 0..255, with its EXIF orientation applied.

    16-bit grey keeps its upper byte; transparency is laid on white; an embedded ICC profile is converted to
    sRGB, and one that is broken or meant for another kind of pixels is passed over, as viewers do. Raises
    BadInput: as `probe_image`.
    """
    image = _loaded(io.BytesIO(data), max_pixels)
    profile = image.info.get("icc_profile")
    if image.mode in DEEP_MODES:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    alpha: Image.Image | None = None
    if image.has_transparency_data:
        image = _straight(image)
        alpha = image.getchannel("A")
    colours = _to_srgb(image, profile)
    if alpha is not None:
        white = Image.new("RGB", colours.size, (255, 255, 255))
        white.paste(colours, mask=alpha)
        colours = white
    return np.array(colours)


def decode_mask(data: bytes, max_pixels: int, threshold: int | None) -> Mask:
    """A mask file as (H, W) bool, True where a cell is, with its EXIF orientation applied.

    Accepted are 1-bit masks, the values {0, 1}, {0, 255} or (16-bit) {0, 65535} in one or three equal
    channels, and palettes of two colours, of which the lighter is cell. Any other mask is grey: `threshold`
    (1..255) makes values of at least that cell; without it the mask is refused. Where values of a 16-bit mask
    exceed 255 their upper byte is compared; of colours it is their luminance (Rec. 601). Raises BadInput: as
    `probe_image`, and grey_mask; unsupported_mode also for a mask with transparent parts.
    """
    image = _loaded(io.BytesIO(data), max_pixels)
    if image.has_transparency_data:
        image = _straight(image)
        if image.getchannel("A").getextrema() != (255, 255):
            raise BadInput("unsupported_mode", "the mask has transparent parts, neither cell nor background")
        image = image.convert("RGB")
    if image.mode == "1":
        return np.array(image)
    if image.mode == "P":
        two_tone = _two_tone(image)
        if two_tone is not None:
            return two_tone
    values, coloured = _grey_values(image)
    present = np.flatnonzero(np.bincount(values.ravel()))
    top = int(present[-1])
    if not coloured and top in (0, 1, 255, 65535) and set(present.tolist()) <= {0, top}:
        return values > 0
    if threshold is None:
        kind = "luminances of colours" if coloured else "grey values"
        raise BadInput(
            "grey_mask",
            f"the mask has {len(present)} {kind} from {present[0]} to {top}, not just 0 and 1 or 0 and 255; "
            "data.mask_threshold N takes values of at least N as cell",
        )
    return (values >> 8 if top > 255 else values) >= threshold


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


def as_picture(rgb: Rgb | Image.Image) -> Image.Image:
    """Pixels as a picture of Pillow's, as they are when they are one already: each way back and forth is a copy."""
    return rgb if isinstance(rgb, Image.Image) else Image.fromarray(np.ascontiguousarray(rgb))


def encode_mask(mask: Mask) -> bytes:
    """(H, W) bool as the bytes of a 1-bit PNG, cells white."""
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(mask)).save(sink, "png")
    return sink.getvalue()


class _StoreTroubleError(Exception):
    """An OSError of the stream, kept apart from the OSErrors by which Pillow says that a file is damaged."""


class _Guarded(io.RawIOBase):
    """A stream not read past its end (object stores raise there), whose own errors stay recognisable."""

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


def _header(stream: BinaryIO, max_pixels: int) -> ImageFile.ImageFile:
    """Open a file, not its pixels, and refuse what its header already rules out."""
    try:
        magic = stream.read(8)
        if not magic:
            raise BadInput("empty_file", "the file has no bytes")
        reader = next((READERS[start] for start in READERS if magic.startswith(start)), None)
        if reader is None:
            raise BadInput("unreadable", f"not a JPEG, PNG, TIFF or BMP file (it begins with {magic!r})")
        stream.seek(0)
        image = reader(stream)
        frames = int(getattr(image, "n_frames", 1))
    except _StoreTroubleError as trouble:
        raise cast(OSError, trouble.__cause__) from None
    except DAMAGE as error:
        code = "unsupported_mode" if "unknown pixel mode" in str(error) else _code_of(error)
        raise BadInput(code, f"the header cannot be read: {_text_of(error)}") from error
    _require_usable(image, frames, max_pixels)
    return image


def _require_usable(image: ImageFile.ImageFile, frames: int, max_pixels: int) -> None:
    width, height = image.size
    if isinstance(image, TiffImageFile):  # a small image may lie in tiles that are enormous
        tile = int(image.tag_v2.get(TILE_WIDTH, 0)), int(image.tag_v2.get(TILE_LENGTH, 0))
        width, height = max((width, height), tile, key=lambda size: size[0] * size[1])
    if width * height > max_pixels:
        raise BadInput("too_large", f"{width} x {height} px exceed data.max_pixels ({max_pixels})")
    if frames > 1:
        raise BadInput("multiple_frames", f"the file holds {frames} images; save the one that is meant")
    if image.mode not in COLOUR_MODES | DEEP_MODES:
        raise BadInput("unsupported_mode", f"pixels of Pillow's mode {image.mode}; save them with 8 bits a channel")


def _loaded(stream: BinaryIO, max_pixels: int) -> Image.Image:
    """The pixels of a file, upright."""
    image = _header(stream, max_pixels)
    turn = _turn(image)
    try:
        image.load()
    except DAMAGE as error:
        raise BadInput(_code_of(error), f"the pixels cannot be read: {_text_of(error)}") from error
    return image if turn == 1 else ImageOps.exif_transpose(image)


def _turn(image: ImageFile.ImageFile) -> int:
    """EXIF orientation 1..8 that is still to be applied, as the header gives it."""
    if isinstance(image, TiffImageFile) or (isinstance(image, PngImageFile) and "exif" not in image.info):
        return 1  # Pillow turns TIFF itself; to look further in a PNG it would read all pixels
    try:
        turn = image.getexif().get(ORIENTATION, 1)
    except DAMAGE:  # damaged EXIF data of a good image
        return 1
    return turn if turn in range(1, 9) else 1


def _code_of(error: BaseException) -> str:
    text = str(error).lower()
    return "truncated" if isinstance(error, EOFError) or any(part in text for part in CUT_SHORT) else "unreadable"


def _text_of(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _straight(image: Image.Image) -> Image.Image:
    """RGBA whose colours are not multiplied by their alpha."""
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        return image.convert("RGB")
    colours = image if image.mode in ("L", "RGB", "CMYK") else image.convert("L" if image.mode == "1" else "RGB")
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image.convert("RGB")  # exactly as stored: a conversion onto itself would round
        converted = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, *DAMAGE):
        return image.convert("RGB")
    return cast(Image.Image, converted)


def _two_tone(image: Image.Image) -> Mask | None:
    """A palette image of two colours (declared, or used) as a mask, the lighter colour True; else None."""
    table = np.array(image.getpalette("RGB"), np.int64).reshape(-1, 3)
    indices = np.asarray(image)
    used = np.flatnonzero(np.bincount(indices.ravel()))
    if used[-1] >= len(table):
        raise BadInput("unreadable", f"the mask uses colour {used[-1]} of a palette of {len(table)}")
    light = table @ (299, 587, 114)
    for colours in (table, table[used]):
        tones = np.unique(colours, axis=0) @ (299, 587, 114)
        if len(tones) == 2 and tones[0] != tones[1]:
            is_lighter: Mask = (light == tones.max())[indices]
            return is_lighter
    return None


def _grey_values(image: Image.Image) -> tuple[npt.NDArray[Any], bool]:
    """(H, W) values of a mask, and whether it is coloured (then they are luminances)."""
    if image.mode in DEEP_MODES or image.mode == "L":
        return np.asarray(image), False
    rgb = image.convert("RGB")
    channels = np.asarray(rgb)
    if (channels != channels[:, :, :1]).any():
        return np.asarray(rgb.convert("L")), True
    return channels[:, :, 0], False
