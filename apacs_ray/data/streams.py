"""Compressed streams of pixels (JPEG, Deflate, PackBits), read so that damage is an error and never a picture.

libtiff, libvips and Pillow pass over damage within a JPEG stream without a word, and over a wrong checksum of Deflate.
So JPEG is decoded by libjpeg-turbo itself, strictly, Deflate by zlib to its end, where the checksum stands, and
PackBits here, where the length says whether a stream is whole. Damage is a ValueError.
"""

from __future__ import annotations

import re
import zlib
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg

from apacs_ray.data.image_header import code_of
from apacs_ray.errors import BadInput

SOI = b"\xff\xd8"
PADDING = re.compile(r": [1-4] extraneous bytes before marker 0xd9$")  # in libjpeg-turbo's messages
CHUNK = 1 << 20  # bytes


def require_sound_jpeg(content: bytes) -> None:
    """Refuse a JPEG file that is damaged within its stream, which Pillow does not report.

    What libjpeg-turbo cannot judge is left to Pillow. A few bytes between the pixels and the end of the file are a
    camera's padding; many are pixels that a decoder that lost its way did not reach.

    Args:
        content: the file.

    Raises:
        BadInput: truncated, unreadable.
    """
    try:
        simplejpeg.decode_jpeg(content, colorspace="GRAY", strict=True)
    except ValueError as error:
        words = str(error)
        if words.startswith(("Corrupt JPEG", "Premature end")) and not PADDING.search(words):
            raise BadInput(code_of(error), f"the pixels cannot be read: {words}") from error


def joined_jpeg(stream: bytes, tables: bytes, adobe: bytes = b"") -> bytes:
    """Return a whole JPEG stream of an abbreviated one, whose `tables` and color space stand in a TIFF's tags.

    Args:
        stream: a tile or strip as stored.
        tables: the tag JPEGTables, empty where the stream has its own.
        adobe: a marker that tells the color space, empty for none.

    Returns:
        A stream that a decoder of JPEG files reads.
    """
    return SOI + adobe + tables[2:-2] + stream[2:]


def jpeg_size(content: bytes) -> tuple[int, int]:
    """Return (height, width) in px as a JPEG stream states them. Raises ValueError for another stream."""
    height, width, *_ = simplejpeg.decode_jpeg_header(content)
    return height, width


def decode_jpeg(content: bytes, colorspace: Literal["RGB", "GRAY"]) -> npt.NDArray[np.uint8]:
    """Return the (H, W, 3 or 1) uint8 pixels of a whole JPEG stream. Raises ValueError when it is damaged."""
    pixels: npt.NDArray[np.uint8] = simplejpeg.decode_jpeg(content, colorspace=colorspace, strict=True)
    return pixels


def require_whole_deflate(stream: bytes) -> None:
    """Raise ValueError unless a Deflate stream is sound up to its checksum; nothing of it is kept."""
    inflater = zlib.decompressobj()
    try:
        while stream and not inflater.eof:
            inflater.decompress(stream, CHUNK)
            stream = inflater.unconsumed_tail
        if not inflater.eof:
            inflater.flush()
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not inflater.eof:
        raise ValueError("the stream ends too early")


def inflate(stream: bytes, size: int) -> bytes:
    """Return the first `size` bytes of a Deflate stream. Raises ValueError unless it is sound up to its checksum."""
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(stream, 2 * size + 64)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if not inflater.eof or len(content) < size:
        raise ValueError(f"its Deflate stream does not end as it should ({len(content)} of {size} bytes)")
    return content[:size]


def unpack_bits(stream: bytes, size: int) -> bytes:
    """Unpack a PackBits stream: runs (257 - n, a byte) and literals (n - 1, n bytes).

    Args:
        stream: packed.
        size: bytes that it must hold.

    Returns:
        These bytes.

    Raises:
        ValueError: another number of bytes comes out of it.
    """
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
