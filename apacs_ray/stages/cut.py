"""What cutting any kind of data into tiles comes to, before it is committed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from apacs_ray.data.folder import Pair, Reject
from apacs_ray.data.shards import Receipt
from apacs_ray.data.splits import read_splits
from apacs_ray.errors import UsageError
from apacs_ray.slides.find import SlideFiles
from apacs_ray.storage import open_store

Unit = TypeVar("Unit", Pair, SlideFiles)


@dataclass(frozen=True)
class Cut:
    """Shards that are written, and what was refused before there were tiles.

    `tiles` were planned, `skipped` of them before a shard was. `unit` names what `units` were listed and what
    `rejects` refuse.
    """

    receipts: Sequence[Receipt]
    rejects: Sequence[Reject]
    unit: str
    units: int
    tiles: int
    val_unit: str
    skipped: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    defects: Sequence[Reject] = ()  # parts of inputs, such as one polygon: told among the rejects, not counted


def with_given_splits(units: Sequence[Unit], uri: str | None) -> list[Unit]:
    """Pairs or slides with the split that the table `data.splits` at `uri` gives their slide; as they are without one.

    Raises UsageError naming the first slide that has no line.
    """
    text = open_store_file(uri)
    if text is None:
        return list(units)
    given = read_splits(text)
    missing = sorted({unit.slide_id for unit in units} - set(given))
    if missing:
        raise UsageError(f"data.splits: {len(missing)} slides have no line there, first {missing[0]!r}")
    return [replace(unit, split=given[unit.slide_id]) for unit in units]


def open_store_file(uri: str | None) -> str | None:
    """The text of a small file at a URI. Raises UsageError when it is not there."""
    if uri is None:
        return None
    folder, _, name = uri.rpartition("/")
    try:
        return open_store(folder or ".").read_small(name).decode("utf-8-sig")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise UsageError(f"{uri}: no such text file") from error
