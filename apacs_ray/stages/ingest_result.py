"""What cutting any kind of data into tiles comes to, before it is committed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from apacs_ray.console import say
from apacs_ray.data.folders import FolderData, Pair
from apacs_ray.data.nested_stores import entries_outside, is_inside, same_folder
from apacs_ray.data.rejects import Reject
from apacs_ray.data.shards import Receipt
from apacs_ray.data.slide_tables import decode_table, read_splits
from apacs_ray.errors import UsageError
from apacs_ray.slides.slide_files import SlideData, SlideFiles
from apacs_ray.stages.pipeline import Context
from apacs_ray.storage import Entry, Store, open_store

Unit = TypeVar("Unit", Pair, SlideFiles)
LONGEST = 300  # characters of the line that says what folders were taken for


@dataclass(frozen=True)
class Cut:
    """Shards that are written, and what was refused before there were tiles.

    `tiles` were planned, `skipped` of them before a shard was. `unit` names what `units` were listed and what
    `rejects` refuse. Of `annotations` some are refused by themselves: their slides stay without masks.
    """

    receipts: Sequence[Receipt]
    rejects: Sequence[Reject]
    unit: str
    units: int
    tiles: int
    val_unit: str
    skipped: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    annotations: int = 0
    annotation_rejects: Sequence[Reject] = ()
    defects: Sequence[Reject] = ()  # parts of inputs, such as one polygon: told among the rejects, not counted


def listed_data(context: Context, store: Store) -> list[Entry]:
    """What lies in the data. What lies below `data.masks` has another role and is left out."""
    masks = _masks_store(context, store)
    entries = context.listed(store)
    return list(entries) if masks is None or is_inside(store, masks) else entries_outside(store, entries, masks)


def listed_masks(context: Context, store: Store) -> tuple[Store | None, list[Entry]]:
    """The store of `data.masks` and what lies there, less the data; None where it is not given, or is the data itself.

    Raises UsageError when nothing lies there.
    """
    masks = _masks_store(context, store)
    if masks is None:
        return None, []
    entries = context.listed(masks)
    if not entries:
        raise UsageError(f"data.masks {masks.uri}: nothing there")
    return masks, entries_outside(masks, entries, store) if is_inside(store, masks) else list(entries)


def _masks_store(context: Context, store: Store) -> Store | None:
    masks = context.settings.data.masks
    found = open_store(masks) if masks else None
    return None if found is None or same_folder(found, store) else found


def say_found(found: FolderData | SlideData) -> None:
    """Tell what each folder was taken for, and what is not used."""
    folders, more = "", 0
    for folder in found.folders:
        text = f"{folders}, {folder}" if folders else folder
        if more or (len(text) > LONGEST and folders):
            more += 1
        else:
            folders = text[:LONGEST]
    if folders:
        say(f"ingest: folders: {folders}{f' and {more} more' if more else ''}")
    told = found.left.describe()
    if told:
        say(f"ingest: {told}")


def with_given_splits(units: Sequence[Unit], uri: str | None) -> list[Unit]:
    """Pairs or slides with the split that the table `data.splits` at `uri` gives their slide; as they are without one.

    Raises UsageError naming the first slide that has no line.
    """
    text = open_store_file(uri)
    if text is None:
        return list(units)
    given = read_splits(text)
    require_clear(units, given, "data.splits")
    missing = sorted({unit.slide_id for unit in units} - set(given))
    if missing:
        raise UsageError(f"data.splits: {len(missing)} slides have no line there, first {missing[0]!r}")
    return [replace(unit, split=given[unit.slide_id]) for unit in units]


def require_clear(units: Sequence[Unit], given: Collection[str], setting: str) -> None:
    """Raise UsageError where a table names several slides by the stem they share."""
    ids = {unit.slide_id for unit in units}
    for stem in sorted({unit.stem for unit in units} & set(given) - ids):
        meant = sorted(unit.slide_id for unit in units if unit.stem == stem)
        if len(meant) > 1:
            several = ", ".join(meant[:4])
            raise UsageError(f"{setting}: {stem!r} may be each of {len(meant)} slides, call them {several}")


def open_store_file(uri: str | None) -> str | None:
    """The text of a small file at a URI. Raises UsageError when it is not there or no text."""
    if uri is None:
        return None
    folder, _, name = uri.rpartition("/")
    try:
        return decode_table(open_store(folder or ".").read_small(name), uri)
    except FileNotFoundError as error:
        raise UsageError(f"{uri}: no such text file") from error
    except OSError as error:  # a folder, or it may not be read
        raise UsageError(f"{uri}: cannot be read ({error}); give a text file that may be read") from error
