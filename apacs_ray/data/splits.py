"""The choice of the tiles that validate, as a part of the training part."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

ValUnit = Literal["slide", "image", "tile"]
COLUMNS: dict[ValUnit, str] = {"slide": "slide_id", "image": "image", "tile": "tile_id"}
MIN_UNITS = 3  # with two units, val would be half of the data


def assign_val(
    tiles: Sequence[Mapping[str, Any]], fraction: float, seed: int, *, slides_known: bool
) -> tuple[list[bool], ValUnit]:
    """Choose which training tiles become val, and in which units.

    The unit is the slide where slides are known and there are at least 3; else the image where there are at least 3;
    else the tile. At least one unit becomes val, and one at least stays (so a single tile stays). The choice depends on
    `seed` and the units' names alone: neither the order nor the size of the tiles changes it.

    Args:
        tiles: each with `slide_id`, `image` (its source) and `tile_id`.
        fraction: about this share (0..1) of the units becomes val.
        seed: of the choice.
        slides_known: `slide_id` names slides, rather than images.

    Returns:
        For each tile whether it becomes val, and the unit.
    """
    unit = _unit(tiles, slides_known)
    names = [str(tile[COLUMNS[unit]]) for tile in tiles]
    units = sorted(set(names), key=lambda name: seeded_rank(seed, name))
    count = max(0, min(max(1, math.floor(len(units) * fraction + 0.5)), len(units) - 1))
    chosen = set(units[:count])
    return [name in chosen for name in names], unit


def _unit(tiles: Sequence[Mapping[str, Any]], slides_known: bool) -> ValUnit:
    candidates: tuple[ValUnit, ...] = ("slide", "image") if slides_known else ("image",)
    for unit in candidates:
        if len({tile[COLUMNS[unit]] for tile in tiles}) >= MIN_UNITS:
            return unit
    return "tile"


def seeded_rank(seed: int, name: str) -> bytes:
    """Return a unit's place in the seeded permutation; a unit more or less leaves the others in order."""
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()
