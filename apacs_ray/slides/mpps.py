"""The table `data.mpps`: resolutions of slides that do not say theirs, or say it wrong."""

from __future__ import annotations

import math

from apacs_ray.data.slide_table import read_slide_table
from apacs_ray.errors import UsageError


def read_mpps(text: str | None) -> dict[str, float]:
    """Slide id -> um per px, of the CSV text of `data.mpps` (slide_id,mpp). Raises UsageError naming the line."""
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
