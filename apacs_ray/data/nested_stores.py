"""Stores that lie within one another, as `data.masks` within `--data`: each file is listed in one of them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from apacs_ray.storage import Entry, LocalStore, S3Store, Store


def same_folder(one: Store, other: Store) -> bool:
    """Tell whether two stores are the same folder, however they are written."""
    return _place(one) == _place(other)


def is_inside(inner: Store, outer: Store) -> bool:
    """Tell whether a store lies below another."""
    (kind, place), (other, above) = _place(inner), _place(outer)
    return kind == other and place != above and _within(place, above)


def entries_outside(store: Store, entries: Sequence[Entry], other: Store) -> list[Entry]:
    """Return the entries of `store` that do not lie in `other` as well; links of folders are followed."""
    kind, above = _place(other)
    folders = {entry.path.rpartition("/")[0] for entry in entries}
    places = {folder: _place(store.child(folder) if folder else store) for folder in folders}
    inside = {folder for folder, place in places.items() if place[0] == kind and _within(place[1], above)}
    return [entry for entry in entries if entry.path.rpartition("/")[0] not in inside]


def _within(place: str, above: str) -> bool:
    return not above or place == above or place.startswith(f"{above.rstrip('/')}/")


def _place(store: Store) -> tuple[str, str]:
    """Return a bucket, or '' for this machine, and the folder there."""
    if isinstance(store, LocalStore):
        return "", os.path.realpath(store.root)
    assert isinstance(store, S3Store)
    return f"s3://{store.bucket}", store.prefix
