"""Source images as pixels, and pixels as encoded tiles. Masks are read by `apacs_ray.data.masks`."""

from __future__ import annotations

import io
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile

from apacs_ray.data.image_header import DAMAGE, DEEP_MODES, code_of, read_header, text_of, turn_of
from apacs_ray.data.streams import require_sound_jpeg
from apacs_ray.errors import BadInput

Rgb = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

DARKEST_16_BIT = 1 << 14  # least maximum of 16-bit values; below, they are a camera's 10, 12 or 14 bits
# Pillow gives a picture's memory back to the system, and the next one's is cleared page by page: a tenth of a tile's
# time. So many blocks of 16 MiB are kept instead.
Image.core.set_blocks_max(4)  # type: ignore[attr-defined]


def decode_image(data: bytes, max_pixels: int) -> Rgb:
    """Decode an image file as 8-bit sRGB, with its EXIF orientation applied.

    Of 16 bits the upper byte is kept, of the 10, 12 or 14 bits of a camera that the file tells the upper eight, and
    values up to 255 are what they are; transparency is laid on white; an embedded ICC profile is converted to sRGB, and
    one that is broken or meant for another kind of pixels is passed over, as viewers do.

    Args:
        data: the file.
        max_pixels: `data.max_pixels`.

    Returns:
        (H, W, 3) uint8, 0..255.

    Raises:
        BadInput: as `probe_image`, and too_dark for 16 bits of which the upper ones are not used.
    """
    header = read_header(io.BytesIO(data), max_pixels, whole=True)
    if isinstance(header.image, JpegImageFile):
        require_sound_jpeg(data)
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


def encode_image(
    rgb: Rgb | Image.Image,
    image_format: Literal["jpeg", "png", "webp"],
    quality: int,
    subsampling: Literal["4:4:4", "4:2:2", "4:2:0"],
) -> bytes:
    """Encode an image; equal pixels give equal bytes with equal library versions.

    Args:
        rgb: (H, W, 3) uint8 sRGB.
        image_format: PNG and WebP are lossless; WebP holds 16383 px a side.
        quality: of JPEG, 1..100.
        subsampling: of JPEG's chroma.

    Returns:
        The bytes of a file.
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
    """Return pixels as an RGB picture of Pillow's, as they are when they are one already: each conversion is a copy.

    Args:
        pixels: (H, W, 3) uint8, or whatever `order` names (BGRX: (H, W) uint32 or (H, W, 4) uint8).
        order: of the channels in memory, a raw mode of Pillow's.

    Returns:
        The picture.
    """
    if isinstance(pixels, Image.Image):
        return pixels
    height, width = pixels.shape[:2]
    picture = Image.new("RGB", (width, height), None)  # not cleared first
    content: Any = memoryview(np.ascontiguousarray(pixels)).cast("B")  # type: ignore[arg-type]
    picture.frombytes(content, "raw", order)
    return picture


def encode_mask(mask: Mask) -> bytes:
    """Encode a mask, (H, W) bool, as the bytes of a 1-bit PNG, cells white."""
    sink = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(mask)).save(sink, "png")
    return sink.getvalue()


def _loaded(image: ImageFile.ImageFile) -> Image.Image:
    """Return the pixels of a file whose header was read, upright."""
    turn = turn_of(image)
    deep = image.mode not in DEEP_MODES and any(";16" in str(tile) for tile in image.tile)
    try:
        image.load()
    except DAMAGE as error:
        raise BadInput(code_of(error), f"the pixels cannot be read: {text_of(error)}") from error
    if deep:  # Pillow keeps only the upper bytes of colors
        extrema = cast(tuple[tuple[int, int], ...], image.getextrema())
        tops = [top for (_, top), band in zip(extrema, image.getbands(), strict=True) if band != "A"]
        _require_bright(max(tops) << 8 | 255)
    return image if turn == 1 else ImageOps.exif_transpose(image)


def _upper_byte(values: npt.NDArray[np.uint16], bits: int | None, white_is_zero: bool) -> npt.NDArray[np.uint8]:
    """Return the upper eight of the bits that 16-bit gray uses, which is decided for the whole image."""
    top = int(values.max())
    if bits is None or not 8 <= bits < 16 or top >> bits:
        bits = 8 if top <= 255 and not white_is_zero else 16  # 8-bit values that were saved with 16 bits
    if white_is_zero:
        values = np.uint16((1 << bits) - 1) - values
    if bits == 16:
        _require_bright(int(values.max()))
    return (values >> (bits - 8)).astype(np.uint8)


def _require_bright(top: int) -> None:
    if top < DARKEST_16_BIT:
        raise BadInput(
            "too_dark",
            f"its 16-bit values end at {top}, as of a camera of {max(top.bit_length(), 10)} bits; save it with 8 bits",
        )


def _straight(image: Image.Image) -> Image.Image:
    """Return RGBA whose colors are not multiplied by their alpha."""
    return (image.convert("LA") if image.mode == "La" else image).convert("RGBA")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        return image.convert("RGB")
    colors = image if image.mode in ("L", "RGB", "CMYK") else image.convert("L" if image.mode == "1" else "RGB")
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return image.convert("RGB")  # as stored: converting sRGB to sRGB would round
        converted = ImageCms.profileToProfile(colors, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, *DAMAGE):
        return image.convert("RGB")
    return cast(Image.Image, converted)
