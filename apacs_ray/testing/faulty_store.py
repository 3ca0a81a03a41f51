"""A store that fails at a write of choice: once, as in trouble, or for good, as for a process that has died there."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NoReturn, Protocol

import pyarrow as pa

from apacs_ray.errors import ApacsError, StoreTroubleError
from apacs_ray.runs.lease import LOCK
from apacs_ray.storage import Entry, LocalStore

Kind = Literal["trouble", "full", "dead"]
KINDS: tuple[Kind, ...] = ("trouble", "full", "dead")


class Died(BaseException):
    """The process ends here: no handler of errors goes on from this."""


class Fault(Protocol):
    """Which write fails, and how.

    `trouble`: once, as of a store in trouble; `full`: once, as of a full disk; `dead`: with whatever is asked of the
    store after it.
    """

    def ask(self) -> None:
        """Raise Died after the end of the process."""

    def write(self, what: str, uri: str) -> None:
        """Count a write, and raise when its turn to fail has come. Heartbeats are not counted: they come any time."""


@dataclass
class OneProcess:
    """A fault of stores that are all in this process.

    Attributes:
        at: Number of the write that fails, from 0; None: none does.
        kind: How it fails.
        writes: What was done to which object, in order, the failed one too.
    """

    at: int | None = None
    kind: Kind = "trouble"
    writes: list[str] = field(default_factory=list)
    _dead: bool = False
    _mutex: threading.Lock = field(default_factory=threading.Lock)

    def ask(self) -> None:
        """Raise Died after the end of the process."""
        if self._dead:
            raise Died

    def write(self, what: str, uri: str) -> None:
        """Count a write, and let it fail when its turn has come."""
        with self._mutex:
            self.ask()
            if uri.endswith(f"/{LOCK}"):
                return
            self.writes.append(f"{what} {uri}")
            if self.at == len(self.writes) - 1:
                self._dead = self.kind == "dead"
                _fail(self.kind, uri)


@dataclass(frozen=True)
class ManyProcesses:
    """A fault of stores in a driver and its workers, which count their writes in a file. `dead` kills the driver.

    Attributes:
        folder: Where they count, outside the run.
        at: Number of the write that fails, from 0.
        kind: How it fails.
        driver: Process id of the driver.
    """

    folder: str
    at: int
    kind: Kind
    driver: int

    def ask(self) -> None:
        """Raise Died after the end of the driver."""
        if Path(self.folder, "dead").exists():
            raise Died

    def write(self, what: str, uri: str) -> None:
        """Count a write, and let it fail when its turn has come."""
        self.ask()
        if uri.endswith(f"/{LOCK}"):
            return
        with Path(self.folder, "writes").open("a+") as writes:
            fcntl.flock(writes, fcntl.LOCK_EX)
            writes.seek(0)
            number = len(writes.readlines())
            print(what, uri, file=writes)
        if number == self.at:
            if self.kind == "dead":
                Path(self.folder, "dead").touch()
                os.kill(self.driver, signal.SIGKILL)
            _fail(self.kind, uri)


def _fail(kind: Kind, uri: str) -> NoReturn:
    if kind == "dead":
        raise Died
    if kind == "trouble":
        raise StoreTroubleError(f"{uri}: cannot write (in trouble)")
    full = OSError(errno.ENOSPC, "No space left on device", uri)
    raise ApacsError(f"{uri}: cannot write ({full.strerror}); make room there") from full


@dataclass(frozen=True)
class FaultyStore(LocalStore):
    """A folder of this machine, whose writes fail as `fault` says."""

    fault: Fault

    def child(self, path: str) -> FaultyStore:
        """Return the store of a folder below, which fails likewise."""
        return FaultyStore(super().child(path).root, self.fault)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield every file."""
        self.fault.ask()
        return super().list(prefix)

    def read(self, path: str) -> bytes:
        """Return all bytes of a file."""
        self.fault.ask()
        return super().read(path)

    def open(self, path: str) -> pa.NativeFile:
        """Open a file."""
        self.fault.ask()
        return super().open(path)

    def version(self, path: str) -> str | None:
        """Return a file's version."""
        self.fault.ask()
        return super().version(path)

    def write(self, path: str, content: bytes) -> None:
        """Replace a file, or fail."""
        self.fault.write("write", self.uri_of(path))
        super().write(path, content)

    def upload(self, path: str, source: Path) -> None:
        """Replace a file by another, or fail."""
        self.fault.write("upload", self.uri_of(path))
        super().upload(path, source)

    def create(self, path: str, content: bytes) -> str:
        """Write a new file, or fail."""
        self.fault.write("create", self.uri_of(path))
        return super().create(path, content)

    def delete(self, path: str) -> None:
        """Remove a file, or fail."""
        self.fault.write("delete", self.uri_of(path))
        super().delete(path)

    def delete_folder(self, path: str) -> None:
        """Remove a folder, or fail."""
        self.fault.write("delete folder", self.uri_of(path))
        super().delete_folder(path)
