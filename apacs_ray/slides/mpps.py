"""The table `data.mpps`: resolutions of slides that do not say theirs, or say it wrong."""

from __future__ import annotations

import csv
import io
import math

from apacs_ray.errors import UsageError


def read_mpps(text: str | None) -> dict[str, float]:
    """Slide id -> um per px, of the CSV text of `data.mpps` (slide_id,mpp). Raises UsageError naming the line."""
    if text is None:
        return {}
    mpps: dict[str, float] = {}
    reader = csv.DictReader(io.StringIO(text))
    try:
        for row in reader:
            mpps[row["slide_id"]] = float(row["mpp"])
            if not 0 < mpps[row["slide_id"]] < math.inf:
                raise UsageError(f"data.mpps, line {reader.line_num}: um per px must be positive")
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UsageError(f"data.mpps, line {reader.line_num}: expected slide_id,mpp with a number") from error
    return mpps
