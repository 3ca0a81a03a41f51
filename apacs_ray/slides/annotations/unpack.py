"""The text of an annotation file, whatever packs and encodes it: gzip, zip, UTF-8, UTF-16, an XML declaration."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import zipfile
import zlib
from typing import Protocol

from apacs_ray.errors import BadInput
from apacs_ray.slides.annotations.shapes import LARGEST_FILE

GZIP, ZIP = b"\x1f\x8b", b"PK"
MAX_MEMBERS = 10_000  # of a zip file
MEMBER = re.compile(r"\.(geojson|json|xml)$", re.IGNORECASE)
PLAIN_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # other methods take as much memory as the file asks for
LEVELS = 2  # a packed file may have been packed once more on its way
CHUNK = 1 << 20

BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark begins alike
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
DECLARATION = re.compile(rb"""\s*<\?xml[^>]{0,100}?\sencoding\s*=\s*["']([A-Za-z0-9._-]{1,30})["']""")
# encodings that an XML may declare: some others that Python knows take quadratic time
ENCODINGS = re.compile(
    r"us-ascii|utf-?8|iso-?8859-\d+|latin-?1|(windows|cp)-?\d+|gb2312|gbk|gb18030|big5|shift[_-]jis|euc-(jp|kr)|koi8-[ru]",
    re.IGNORECASE,
)


def unpacked(content: bytes) -> bytes:
    """Return the annotation inside a gzip or zip file; others as they are. Raises BadInput: bad_annotation."""
    for _ in range(LEVELS):
        if len(content) > LARGEST_FILE:
            raise too_large(f"{len(content)} bytes")
        if content.startswith(GZIP):
            try:
                with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
                    content = _bounded(stream)
            except (OSError, EOFError, zlib.error) as error:
                raise BadInput("bad_annotation", f"a damaged gzip file ({error}): pack it again") from error
        elif content.startswith(ZIP):
            try:
                content = _only_member(content)
            except (zipfile.BadZipFile, OSError, EOFError, zlib.error, ValueError, RuntimeError) as error:
                raise BadInput("bad_annotation", f"a damaged zip file ({error}): pack it again") from error
    return content


def too_large(what: str) -> BadInput:
    """Return the defect of a file that is larger than `LARGEST_FILE`."""
    return BadInput("bad_annotation", f"{what}; {LARGEST_FILE} are the limit")


class _Stream(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _bounded(stream: _Stream) -> bytes:
    """Return all that a packed stream holds, if that is not too much."""
    parts, size = [], 0
    while chunk := stream.read(CHUNK):
        parts.append(chunk)
        size += len(chunk)
        if size > LARGEST_FILE:
            raise too_large("unpacked, it has more bytes than an annotation may have")
    return b"".join(parts)


def _only_member(content: bytes) -> bytes:
    if content.count(b"PK\x01\x02") > MAX_MEMBERS:
        raise BadInput("bad_annotation", f"a zip file of more than {MAX_MEMBERS} files")
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        members = [member for member in packed.infolist() if _may_annotate(member.filename)]
        if len(members) != 1:
            named = ", ".join(member.filename[:60] for member in members[:3]) or "none"
            raise BadInput(
                "bad_annotation",
                f"a zip file with {len(members)} annotations (.geojson, .json or .xml: {named}): pack exactly one",
            )
        (member,) = members
        if member.flag_bits & 1:
            raise BadInput("bad_annotation", "a zip file with a password: pack it without")
        if member.compress_type not in PLAIN_METHODS:
            raise BadInput("bad_annotation", "a zip file that is not packed by Deflate: pack it again")
        with packed.open(member) as stream:
            return _bounded(stream)


def _may_annotate(path: str) -> bool:
    """Tell whether a member of a zip file is meant: none that an operating system adds, or hides."""
    parts = path.replace("\\", "/").split("/")
    return bool(MEMBER.search(parts[-1])) and not any(part == "__MACOSX" or part.startswith(".") for part in parts)


def decoded(content: bytes) -> str:
    """Decode the text of a JSON or XML file, by its byte order mark, zero bytes or declaration, else as UTF-8.

    Args:
        content: the file, unpacked.

    Returns:
        Its text.

    Raises:
        BadInput: bad_annotation; it is no text in a known encoding.
    """
    try:
        return content.decode(_encoding_of(content))
    except (UnicodeError, LookupError) as error:
        raise BadInput("bad_annotation", f"no text ({str(error)[:100]}): save it as UTF-8") from error


def _encoding_of(content: bytes) -> str:
    for bom, encoding in BOMS:
        if content.startswith(bom):
            return encoding
    zeros = [not byte for byte in content[:2]]
    if zeros == [False, True] or zeros == [True, False]:
        return "utf-16-le" if zeros[1] else "utf-16-be"
    declared = DECLARATION.match(content)
    if declared is None or re.fullmatch(rb"utf-?16", declared[1], re.IGNORECASE):
        return "utf-8"  # no zero bytes: the declaration says UTF-16, the file was written as UTF-8
    encoding = declared[1].decode()
    if not ENCODINGS.fullmatch(encoding):
        raise BadInput("bad_annotation", f"an XML in the encoding {encoding}: save it as UTF-8")
    return encoding
