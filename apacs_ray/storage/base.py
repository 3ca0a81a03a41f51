"""What every store can do: list, read and write objects below a URI, and which paths an object may have."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.fs as pafs

from apacs_ray.errors import ApacsError

SMALL = 64 << 20  # bytes of a table, a record or a description that a person or a run wrote


@dataclass(frozen=True)
class Entry:
    """One listed object.

    Attributes:
        path: Below the listed store, '/'-separated, verbatim.
        size: In bytes.
        version: The ETag, or size and modification time of a local file.
    """

    path: str
    size: int
    version: str


class Conflict(Exception):
    """A conditional write met another writer's object."""


class Store(ABC):
    """A folder of objects at `uri`. Paths are relative to it, '/'-separated; a write appears at once or not at all."""

    uri: str

    @abstractmethod
    def child(self, path: str) -> Store:
        """Return the store below `path`."""

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield every object below folder `prefix`, recursively, in no particular order; S3 is read in pages."""

    @abstractmethod
    def read(self, path: str) -> bytes:
        """Return all bytes of an object. Raises FileNotFoundError."""

    def read_small(self, path: str, most: int = SMALL) -> bytes:
        """Read an object that others may have written.

        Args:
            path: Of the object.
            most: The largest size that is read, in bytes.

        Returns:
            All its bytes.

        Raises:
            ApacsError: The object has more than `most` bytes.
            FileNotFoundError: There is no object.
        """
        with self.open(path) as stream:
            if stream.size() > most:
                raise ApacsError(f"{self.uri_of(path)}: {stream.size()} bytes, where at most {most} are read")
            return cast(bytes, stream.read())

    @abstractmethod
    def version(self, path: str) -> str | None:
        """Return the object's version, None when there is none."""

    @abstractmethod
    def write(self, path: str, content: bytes) -> None:
        """Replace an object as a whole."""

    @abstractmethod
    def upload(self, path: str, source: Path) -> None:
        """Replace an object by a local file, of any size."""

    @abstractmethod
    def create(self, path: str, content: bytes) -> str:
        """Write an object that must not exist and return its version. Raises Conflict when it exists."""

    @abstractmethod
    def replace(self, path: str, content: bytes, version: str) -> str:
        """Replace an object that must still be at `version` and return the new version. Raises Conflict."""

    @abstractmethod
    def delete(self, path: str) -> None:
        """Remove an object; no error when it is gone already."""

    @abstractmethod
    def delete_folder(self, path: str) -> None:
        """Remove everything below `path`."""

    @property
    @abstractmethod
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow filesystem of this store, opened once a process."""

    @abstractmethod
    def full_path(self, path: str = "") -> str:
        """Return `path` as `filesystem` wants it."""

    def with_timeout(self, seconds: float) -> Store:
        """Return this store with `seconds` as the time for which a request is tried again; a local one has none."""
        return self

    @property
    def is_local(self) -> bool:
        """Whether only this machine sees it."""
        return False

    def uri_of(self, path: str) -> str:
        """Return the URI of an object, for people and for tile rows."""
        return f"{self.uri.rstrip('/')}/{path}"

    def open(self, path: str) -> pa.NativeFile:
        """Open an object for random access. Raises FileNotFoundError."""
        return self.filesystem.open_input_file(self.full_path(path))


def is_bad_path(path: str) -> bool:
    """Return whether a path below a store could lead out of it, or is no text: absolute, `..`, empty parts, NUL."""
    parts = path.split("/")
    return any(part in ("", ".", "..") for part in parts) or "\0" in path or not _is_text(path)


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # a file name in another encoding
        return False
    return True
