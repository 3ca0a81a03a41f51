"""CSV tables with a line a slide: `data.splits`, which says what each is used for, and `data.mpps`, its um per px.

They have a column `slide_id`, another with what is said of the slide, and any more. Fields are parted by commas,
semicolons or tabs, as the header is.
"""

from __future__ import annotations

import codecs
import csv
import io
import math
import unicodedata

from apacs_ray.data.words import SPLITS, Split
from apacs_ray.errors import UsageError
from apacs_ray.storage import open_store

BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
DELIMITERS = ",;\t"  # Excel writes semicolons where the comma is the decimal mark


def read_table_text(uri: str | None) -> str | None:
    """Read the text of the table at a URI.

    Args:
        uri: of the file, or None.

    Returns:
        The text, None without a URI.

    Raises:
        UsageError: it is not there, may not be read or is no text.
    """
    if uri is None:
        return None
    folder, _, name = uri.rpartition("/")
    try:
        return decode_table(open_store(folder or ".").read_small(name), uri)
    except FileNotFoundError as error:
        raise UsageError(f"{uri}: no such text file") from error
    except OSError as error:  # a folder, or it may not be read
        raise UsageError(f"{uri}: cannot be read ({error}); give a text file that may be read") from error


def decode_table(content: bytes, name: str) -> str:
    """Decode the text of a table in UTF-8 or UTF-16. Raises UsageError naming it when it is in another encoding."""
    encoding = next((encoding for bom, encoding in BYTE_ORDER_MARKS if content.startswith(bom)), None)
    if encoding is None:  # no byte order mark: in UTF-16, ASCII letters have a zero byte each
        encoding = {(True, False): "utf-16-be", (False, True): "utf-16-le"}.get(
            (content[:1] == b"\0", content[1:2] == b"\0"), "utf-8"
        )
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UsageError(
            f"{name}: no text in UTF-8 or UTF-16 (byte {content[error.start]:#x} on line {line}); save it as CSV UTF-8"
        ) from error


def read_slide_table(text: str, setting: str, column: str) -> dict[str, tuple[int, str]]:
    """Read one column of a table of slides.

    Args:
        text: CSV.
        setting: that names the table, for errors.
        column: its name, beside `slide_id`.

    Returns:
        Slide id -> number of its line and its value.

    Raises:
        UsageError: with the number of the line that is wrong.
    """
    text = text.removeprefix("\ufeff")
    first = next((line for line in text.splitlines() if line.strip()), "")
    delimiter = max(DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    lines: list[tuple[int, list[str]]] = []
    try:
        lines.extend((reader.line_num, fields) for fields in reader if any(field.strip() for field in fields))
    except csv.Error as error:
        raise UsageError(f"{setting}, line {reader.line_num}: {error}") from error
    if not lines:
        raise UsageError(f"{setting}: the file is empty; it needs a header slide_id,{column} and a line a slide")
    number, header = lines[0]
    names = [name.strip().lower() for name in header]
    if names.count("slide_id") != 1 or names.count(column) != 1:
        raise UsageError(f"{setting}, line {number}: the header must be slide_id,{column}, not {','.join(header)}")
    values: dict[str, tuple[int, str]] = {}
    for number, fields in lines[1:]:
        if len(fields) != len(names):
            raise UsageError(f"{setting}, line {number}: {len(fields)} fields where the header has {len(names)}")
        slide = unicodedata.normalize("NFC", fields[names.index("slide_id")].strip())
        if not slide:
            raise UsageError(f"{setting}, line {number}: the slide_id is empty")
        if slide in values:
            raise UsageError(f"{setting}, line {number}: slide {slide!r} is on line {values[slide][0]} already")
        values[slide] = (number, fields[names.index(column)].strip())
    return values


def read_splits(text: str) -> dict[str, Split]:
    """Return slide id -> split, of the CSV text of `data.splits` (slide_id,split).

    Args:
        text: the table's.

    Returns:
        The split of each slide of the table.

    Raises:
        UsageError: naming the line that is wrong.
    """
    splits: dict[str, Split] = {}
    for slide, (number, value) in read_slide_table(text, "data.splits", "split").items():
        split = value.lower()
        if split not in SPLITS:
            raise UsageError(
                f"data.splits, line {number}: split {split!r} of slide {slide!r} is not train, val or test"
            )
        splits[slide] = split
    return splits


def read_mpps(text: str | None) -> dict[str, float]:
    """Return slide id -> um per px, of the CSV text of `data.mpps` (slide_id,mpp); of None an empty one.

    Slides need it that do not say their resolution, or say it wrong.

    Args:
        text: the table's.

    Returns:
        um per level-0 px.

    Raises:
        UsageError: naming the line that is wrong.
    """
    mpps: dict[str, float] = {}
    if text is None:
        return mpps
    for slide, (number, value) in read_slide_table(text, "data.mpps", "mpp").items():
        try:
            mpps[slide] = float(value.replace(",", "."))  # as spreadsheets write it in much of the world
        except ValueError as error:
            raise UsageError(f"data.mpps, line {number}: {value!r} of slide {slide!r} is not a number") from error
        if not 0 < mpps[slide] < math.inf:
            raise UsageError(f"data.mpps, line {number}: um per px of slide {slide!r} must be positive, not {value}")
    return mpps
