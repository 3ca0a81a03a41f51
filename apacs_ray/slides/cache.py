"""Slides of an object store on this node's disk: whole or not at all, bounded, shared by the node's processes.

A slide is staged into `<cache>/<key>/`, where the key names its URI and the versions of all its files; another version
is another slide. It is copied into a folder beside that one and renamed, so a kill leaves nothing that looks whole.
A file lock a slide lets one process copy while others wait, and keeps a slide in use from being thrown out; both end
with the process that holds them. The least recently used slides make room.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from apacs_ray.config.settings import DataSettings
from apacs_ray.errors import ApacsError, BadInput
from apacs_ray.storage import Entry, Store, is_bad_path
from apacs_ray.storage.own_folder import open_own_file, own_folder

GIB = 1 << 30
CHUNK = 8 << 20  # bytes
LOCK = ".lock"
_OURS = re.compile(r"[0-9a-f]{24}(\.part-\S+)?")  # folders of staged slides; nothing else is touched


def default_cache() -> str:
    """Return a folder of this user's own: others could put slides of theirs into one that all share."""
    return str(Path(tempfile.gettempdir()) / f"apacs_ray-slides-{os.getuid()}")  # `staged` makes sure that it is


@dataclass(frozen=True)
class SlideCache:
    """A folder of staged slides that holds at most `limit` bytes, beside what is in use."""

    folder: Path
    limit: int

    @classmethod
    def of(cls, settings: DataSettings) -> SlideCache:
        """Return the cache that settings ask for."""
        return cls(Path(settings.cache or default_cache()), round(settings.cache_gb * GIB))

    @contextlib.contextmanager
    def staged(self, store: Store, entries: Sequence[Entry]) -> Iterator[Path]:
        """Copy the files of a slide, or of its annotation, to this node, and keep them there while they are in use.

        A local store is used where it lies.

        Args:
            store: where the files lie.
            entries: the files.

        Yields:
            The folder that they are in; join it with their paths.

        Raises:
            BadInput: missing_file when a file is gone, bad_name.
            ApacsError: the disk is full.
        """
        if store.is_local:
            yield Path(store.full_path())
            return
        key = hashlib.sha256("\0".join([store.uri, *(f"{e.path}\0{e.version}" for e in entries)]).encode()).hexdigest()
        place = self.folder / key[:24]
        if str(self.folder) == default_cache():
            own_folder(self.folder)
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open_own_file(self.folder / f"{place.name}{LOCK}") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if place.is_symlink():
                raise ApacsError(f"{place}: a link, which no run makes there; remove it, then start again")
            if not place.is_dir():
                self._stage(store, entries, place)
            os.utime(place)  # most recently used
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield place

    def _stage(self, store: Store, entries: Sequence[Entry], place: Path) -> None:
        self._make_room(sum(entry.size for entry in entries), place.name)
        for left in self.folder.glob(f"{place.name}.part-*"):  # of a killed process: a living one would hold the lock
            shutil.rmtree(left, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=f"{place.name}.part-", dir=self.folder))
        try:
            for entry in entries:
                copy_object(store, entry, part / path_inside(entry.path))
            part.rename(place)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ApacsError(
                    f"{self.folder}: no space left for {store.uri_of(entries[0].path)}; give data.cache a larger disk, "
                    "then start the same command again"
                ) from error
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _make_room(self, wanted: int, keep: str) -> None:
        """Throw out the least recently used slides until `wanted` bytes fit under the limit, or all left are in use."""
        ours = [path for path in self.folder.iterdir() if _OURS.fullmatch(path.name) and path.name != keep]
        held = [(path.stat().st_mtime, path) for path in ours if path.is_dir() and not path.is_symlink()]
        sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for _, path in held}
        total = sum(sizes.values())
        for _, path in sorted(held):
            if total + wanted <= self.limit:
                return
            if ".part-" in path.name:
                continue
            with open_own_file(self.folder / f"{path.name}{LOCK}") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # in use
                gone = path.with_name(f"{path.name}.part-gone-{time.monotonic_ns()}")
                path.rename(gone)  # so that a half-deleted slide does not look whole
                shutil.rmtree(gone, ignore_errors=True)
                total -= sizes[path]


def path_inside(path: str) -> Path:
    """Return a key as a relative path that cannot leave the cache. Raises BadInput (bad_name)."""
    if is_bad_path(path):
        raise BadInput("bad_name", f"{path!r} is no path that can be staged")
    return Path(path)


def copy_object(store: Store, entry: Entry, target: Path) -> None:
    """Copy an object of a store to a local file, in pieces of `CHUNK` bytes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with store.open(entry.path) as source, target.open("wb") as sink:
            while chunk := source.read(CHUNK):
                sink.write(chunk)
    except FileNotFoundError as error:
        raise BadInput("missing_file", f"{store.uri_of(entry.path)} is gone") from error
    if target.stat().st_size != entry.size:
        raise OSError(f"{store.uri_of(entry.path)}: {target.stat().st_size} of {entry.size} bytes arrived")
