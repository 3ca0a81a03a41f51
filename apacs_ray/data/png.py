"""PNG files without what Pillow refuses in them: long texts, and color profiles of more than a megabyte.

Pillow unpacks a PNG's texts as it opens it and refuses the file when one is long (ImageJ and Photoshop write such).
Texts say nothing of the pixels, so they are left out of what Pillow sees. Nothing here unpacks more than a profile of
`MAX_PROFILE` bytes.
"""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from PIL.PngImagePlugin import MAX_TEXT_CHUNK

SIGNATURE = b"\x89PNG\r\n\x1a\n"
TEXTS = {b"tEXt", b"zTXt", b"iTXt"}
MAX_PROFILE = 16 << 20  # bytes
BUFFER = 1 << 12  # bytes; small, because the stream below has a buffer as well
TO_THE_END = 1 << 62


@dataclass(frozen=True)
class Png:
    """A PNG to be opened by Pillow.

    Attributes:
        stream: the file without its texts.
        profile: a color profile that Pillow would refuse.
        bits: the significant ones of each channel (sBIT).
    """

    stream: BinaryIO
    profile: bytes | None
    bits: int | None


def without_texts(stream: BinaryIO, *, whole: bool) -> Png:
    """Look through the chunks of a PNG, up to its pixels or through the `whole` file. Damage is left to the decoder."""
    ranges = [(0, len(SIGNATURE))]
    profile: bytes | None = None
    bits: int | None = None
    position = len(SIGNATURE)
    while True:
        stream.seek(position)
        head = stream.read(8)
        length, name = struct.unpack(">I4s", head) if len(head) == 8 else (0, b"IEND")
        if name == b"IEND" or (name == b"IDAT" and not whole):
            break
        if name == b"sBIT" and 1 <= length <= 4:
            bits = max(stream.read(length), default=None)
        elif name == b"iCCP" and length <= MAX_PROFILE:
            profile = _profile(stream.read(length)) or profile
        end = position + 12 + length
        if name not in TEXTS and not (name == b"iCCP" and profile):
            ranges.append((position, end))
        position = end
    ranges.append((position, TO_THE_END))
    return Png(cast(BinaryIO, io.BufferedReader(_Spliced(stream, ranges), BUFFER)), profile, bits)


def _profile(chunk: bytes) -> bytes | None:
    """Return the profile of an iCCP chunk where it is too large for Pillow, and not for us."""
    start = chunk.find(b"\0") + 2
    unpacking = zlib.decompressobj()
    try:
        profile = unpacking.decompress(chunk[start:], MAX_PROFILE)
    except zlib.error:
        return None
    return profile if len(profile) > MAX_TEXT_CHUNK and unpacking.eof else None


class _Spliced(io.RawIOBase):
    """The given ranges of a stream, one behind the other."""

    def __init__(self, stream: BinaryIO, ranges: list[tuple[int, int]]) -> None:
        self._stream = stream
        self._ranges = ranges[:1]
        for start, end in ranges[1:]:
            if start == self._ranges[-1][1]:
                start = self._ranges.pop()[0]
            self._ranges.append((start, end))
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        before = 0
        for start, end in self._ranges:
            inside = self._position - before
            if inside < end - start:
                self._stream.seek(start + inside)
                content = self._stream.read(min(len(buffer), end - start - inside))
                buffer[: len(content)] = content
                self._position += len(content)
                return len(content)
            before += end - start
        return 0
