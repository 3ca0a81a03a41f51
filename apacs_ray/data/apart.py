"""Files have one role: what lies in two stores is listed in one of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache

from apacs_ray.storage import Entry, LocalStore, S3Store, Store


def same_place(one: Store, other: Store) -> bool:
    """Whether two stores are the same folder, however they are written."""
    return _key(one) == _key(other)


def apart(store: Store, entries: Sequence[Entry], other: Store) -> list[Entry]:
    """The entries of `store` that do not lie in `other` as well; links of folders are followed."""
    if isinstance(store, LocalStore) and isinstance(other, LocalStore):
        inside = os.path.realpath(other.root)
        real = lru_cache(maxsize=None)(lambda folder: os.path.realpath(os.path.join(store.root, folder)))
        return [entry for entry in entries if not _within(real(os.path.dirname(entry.path)), inside)]
    if isinstance(store, S3Store) and isinstance(other, S3Store) and store.bucket == other.bucket:
        above = f"{other.prefix}/" if other.prefix else ""
        return [entry for entry in entries if not f"{store.child(entry.path).prefix}".startswith(above)]
    return list(entries)


def _within(folder: str, outer: str) -> bool:
    return folder == outer or folder.startswith(outer.rstrip(os.sep) + os.sep)


def _key(store: Store) -> str:
    return os.path.realpath(store.root) if isinstance(store, LocalStore) else store.uri
