"""A store in a folder of this machine, or of a disk that it has mounted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow.fs as pafs

from apacs_ray.errors import ApacsError
from apacs_ray.storage.base import Conflict, Entry, Store, is_bad_path
from apacs_ray.storage.own_folder import open_own_file

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger(__name__)


def file_facts(path: Path) -> dict[str, Any]:
    """Return `size` and `sha256` of a file, as records name it by."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


@dataclass(frozen=True)
class LocalStore(Store):
    """A folder of this machine."""

    root: str

    @property
    def uri(self) -> str:  # type: ignore[override]
        """The folder's path."""
        return self.root

    @property
    def is_local(self) -> bool:
        """True: only this machine sees it."""
        return True

    def child(self, path: str) -> LocalStore:
        """Return the store of a folder below."""
        return LocalStore(os.path.join(self.root, path))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield every regular file below folder `prefix`, links followed; what may not be read is logged."""
        base = os.path.join(self.root, prefix)
        ancestors: dict[str, set[tuple[int, int]]] = {base: set()}  # folder -> those it lies in, links followed
        for folder, folders, files in os.walk(base, onerror=_log_not_listed, followlinks=True):
            inside = ancestors.pop(folder) | {_identity(folder)}
            # a link to a folder that it lies in would lead round and round
            folders[:] = sorted(name for name in folders if _identity(os.path.join(folder, name)) not in inside)
            ancestors |= {os.path.join(folder, name): inside for name in folders}
            unreadable = 0  # files that may not even be looked at
            for name in sorted(files):
                full = os.path.join(folder, name)
                try:
                    status = os.stat(full)
                except PermissionError:
                    unreadable += 1
                    continue
                except OSError as error:
                    if error.errno in (errno.ENOENT, errno.ELOOP):  # removed meanwhile; a link to nowhere or to itself
                        continue
                    raise
                if stat.S_ISREG(status.st_mode):  # to read a pipe or a device may never end
                    relative = os.path.relpath(full, self.root).replace(os.sep, "/")
                    yield Entry(relative, status.st_size, _version_of(status))
            if unreadable:
                _log.warning(
                    "%s: %d files may not be read and are left out; correct the folder's rights", folder, unreadable
                )

    def read(self, path: str) -> bytes:
        """Return all bytes of a file. Raises FileNotFoundError."""
        return Path(self.root, path).read_bytes()

    def version(self, path: str) -> str | None:
        """Return size and modification time of a file, None when there is none."""
        try:
            return _version_of(os.stat(os.path.join(self.root, path)))
        except FileNotFoundError:
            return None

    def write(self, path: str, content: bytes) -> None:
        """Replace a file as a whole. Raises ApacsError when that is not possible."""
        self._place(path, lambda temporary: temporary.write_bytes(content))

    def upload(self, path: str, source: Path) -> None:
        """Replace a file by a copy of another. Raises ApacsError when that is not possible."""
        self._place(path, lambda temporary: shutil.copyfile(source, temporary))

    def _place(self, path: str, fill: Callable[[Path], object]) -> None:
        """Let `fill` write a file beside the one at `path`, then give it that name."""
        target = self._inside(path)
        temporary = _temporary(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            fill(temporary)
            _sync(temporary)
            temporary.replace(target)
            _sync(target.parent)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise _cannot_write(target, error) from error

    def create(self, path: str, content: bytes) -> str:
        """Write a file that must not exist.

        Args:
            path: Of the file.
            content: All its bytes.

        Returns:
            Its version.

        Raises:
            Conflict: It exists.
            ApacsError: The disk is full, or the path leads out of the store.
        """
        target = self._inside(path)
        # a linked name appears complete and only once when this process dies between (O_EXCL may leave it empty)
        temporary = _temporary(target)
        with _named(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(content)
                _sync(temporary)
                os.link(temporary, target)
                _sync(target.parent)
            except FileExistsError as error:
                raise Conflict(str(target)) from error
            finally:
                temporary.unlink(missing_ok=True)
        return _version_of(os.stat(target))

    def replace(self, path: str, content: bytes, version: str) -> str:
        """Replace a file that must still be at `version`, under a file lock.

        Args:
            path: Of the file.
            content: All its new bytes.
            version: As `version` or a write returned it.

        Returns:
            The new version.

        Raises:
            Conflict: The file is at another version, or gone.
            ApacsError: The disk is full, or the path leads out of the store.
        """
        import fcntl

        target = self._inside(path)
        guard = target.with_name(f".{target.name}.guard")
        with _named(guard), open_own_file(guard) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.version(path) != version:
                raise Conflict(path)
            self.write(path, content)
            return cast(str, self.version(path))

    def delete(self, path: str) -> None:
        """Remove a file; no error when it is gone already. Raises ApacsError when it cannot be removed."""
        target = self._inside(path)
        try:
            target.unlink()
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise ApacsError(f"{target}: cannot be deleted ({error.strerror}); the run goes on once it can") from error

    def delete_folder(self, path: str) -> None:
        """Remove a folder with all it holds; links are removed, never what they lead to."""
        shutil.rmtree(self._inside(path), ignore_errors=True)

    def _inside(self, path: str) -> Path:
        """Return the file to write or delete at `path`. Raises ApacsError when it would be outside this store."""
        target = Path(self.root, path)
        root = os.path.realpath(self.root)
        parent = os.path.realpath(target.parent if path else target)
        if (is_bad_path(path) and path) or os.path.commonpath([root, parent]) != root:
            raise ApacsError(
                f"{path!r} leads out of {self.root}, where nothing is written; remove the link or the file"
            )
        return target

    @property
    def filesystem(self) -> pafs.FileSystem:
        """The pyarrow filesystem of this machine."""
        return pafs.LocalFileSystem()

    def full_path(self, path: str = "") -> str:
        """Return the absolute path of a file, or of the store itself."""
        return os.path.join(self.root, path) if path else self.root


def _log_not_listed(error: OSError) -> None:
    """Log a folder whose files are not seen; that a folder does not exist is no news, a run asks for many."""
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        _log.warning(
            "%s: cannot be listed (%s), so nothing in it is seen; correct its rights", error.filename, error.strerror
        )


def _identity(folder: str) -> tuple[int, int]:
    """Return device and inode, the same for a folder however it is reached."""
    try:
        status = os.stat(folder)
    except OSError:  # removed meanwhile; nothing will be found in it
        return (-1, -1)
    return (status.st_dev, status.st_ino)


def _temporary(target: Path) -> Path:
    """Return a name of its own for a file that becomes `target`; short, as a name may be 255 bytes long."""
    return target.with_name(f".{target.name[:40]}.{uuid.uuid4().hex[:8]}.tmp")


@contextlib.contextmanager
def _named(target: Path) -> Iterator[None]:
    """Turn what writing a file meets (a full disk, no right to write, a file where a folder is to be) into one line."""
    try:
        yield
    except OSError as error:
        raise _cannot_write(target, error) from error


def _cannot_write(target: Path, error: OSError) -> ApacsError:
    full = error.errno in DISK_FULL
    advice = "make room there, and the same command goes on" if full else "change that, or --output"
    return ApacsError(f"{target}: cannot write ({error.strerror}); {advice}")


def _version_of(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}"


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk: a power cut then leaves the old or the new."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)
