"""CSV tables with a line a slide: a column `slide_id`, another with what is said of the slide, and any more."""

from __future__ import annotations

import csv
import io
import unicodedata

from apacs_ray.errors import UsageError


def read_slide_table(text: str, setting: str, column: str) -> dict[str, tuple[int, str]]:
    """Slide id -> number of its line and its value in `column`, of the CSV text that `setting` names.

    Raises UsageError with the number of the line that is wrong.
    """
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
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
    given: dict[str, tuple[int, str]] = {}
    for number, fields in lines[1:]:
        if len(fields) != len(names):
            raise UsageError(f"{setting}, line {number}: {len(fields)} fields where the header has {len(names)}")
        slide = unicodedata.normalize("NFC", fields[names.index("slide_id")].strip())
        if not slide:
            raise UsageError(f"{setting}, line {number}: the slide_id is empty")
        if slide in given:
            raise UsageError(f"{setting}, line {number}: slide {slide!r} is on line {given[slide][0]} already")
        given[slide] = (number, fields[names.index(column)].strip())
    return given
