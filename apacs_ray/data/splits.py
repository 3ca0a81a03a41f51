"""Which tiles train, validate and test: the table `data.splits`, and val as a part of the training part."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from apacs_ray.data.folders import SPLITS, Split
from apacs_ray.data.slide_table import read_slide_table
from apacs_ray.errors import UsageError

ValUnit = Literal["slide", "image", "tile"]
COLUMNS: dict[ValUnit, str] = {"slide": "slide_id", "image": "image", "tile": "tile_id"}
MIN_UNITS = 3  # of two, the one for val would be half of all the data


def assign_val(
    tiles: Sequence[Mapping[str, Any]], fraction: float, seed: int, *, slides_known: bool
) -> tuple[list[bool], ValUnit]:
    """For each training tile whether it becomes val, and in which units that was decided.

    `tiles` have `slide_id`, `image` (their source) and `tile_id`. The unit is the slide where slides are
    known and there are at least 3; else the image where there are at least 3; else the tile. About `fraction`
    (0..1) of the units become val: at least one, and one at least stays (so a single tile stays). The choice
    depends on `seed` and the units' names alone: neither the order nor the size of the tiles changes it.
    """
    unit = _unit(tiles, slides_known)
    names = [str(tile[COLUMNS[unit]]) for tile in tiles]
    units = sorted(set(names), key=lambda name: _rank(seed, name))
    count = max(0, min(max(1, math.floor(len(units) * fraction + 0.5)), len(units) - 1))
    chosen = set(units[:count])
    return [name in chosen for name in names], unit


def _unit(tiles: Sequence[Mapping[str, Any]], slides_known: bool) -> ValUnit:
    candidates: tuple[ValUnit, ...] = ("slide", "image") if slides_known else ("image",)
    for unit in candidates:
        if len({tile[COLUMNS[unit]] for tile in tiles}) >= MIN_UNITS:
            return unit
    return "tile"


def _rank(seed: int, name: str) -> bytes:
    """A unit's place in the seeded permutation; a unit more or less leaves the others in order."""
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()


def read_splits(text: str) -> dict[str, Split]:
    """Slide id -> split, of the CSV text of `data.splits` (slide_id,split). Raises UsageError naming the line."""
    splits: dict[str, Split] = {}
    for slide, (number, value) in read_slide_table(text, "data.splits", "split").items():
        split = value.lower()
        if split not in SPLITS:
            raise UsageError(
                f"data.splits, line {number}: split {split!r} of slide {slide!r} is not train, val or test"
            )
        splits[slide] = split
    return splits
