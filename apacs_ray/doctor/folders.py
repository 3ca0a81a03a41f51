"""Checks of local data and output by the operations of a run, on one small file that is removed."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from apacs_ray.doctor.finding import Finding
from apacs_ray.doctor.machine import existing_parent
from apacs_ray.errors import ApacsError
from apacs_ray.storage import Conflict, LocalStore

FIRST_BYTES = 1024  # read of the first file
NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # of link(2) on a disk without hard links
CONTENT = b"written by apacs_ray doctor; may be deleted\n"


def check_data(store: LocalStore, name: str = "data") -> Iterator[Finding]:
    """Check that the folder can be listed and its first file read."""
    folder = Path(store.root)
    try:
        if not folder.exists():
            yield Finding(name, "failed", f"{folder}: no such folder", "correct the path, or mount it here")
            return
        if not folder.is_dir():
            yield Finding(name, "failed", f"{folder} is a file", f"give the folder: {folder.parent}")
            return
        os.listdir(folder)  # `list` passes over folders that may not be entered
        first = next(store.list(), None)
        if first is None:
            yield Finding(name, "failed", f"{folder}: no file that can be listed", "put the images or slides there")
            return
        with store.open(first.path) as file:
            file.read(FIRST_BYTES)
    except PermissionError as error:
        message = f"{error.filename or folder}: this user (uid {os.geteuid()}) may not read it"
        yield Finding(name, "failed", message, f"as its owner: chmod -R a+rX '{folder}'")
        return
    yield Finding(name, "ok", f"{folder}: lists, and reads {first.path}")


def check_output(store: LocalStore, name: str = "output") -> Iterator[Finding]:
    """Check that a run can create, replace, list, read, delete and lock files there. Nothing is left behind."""
    folder = Path(store.root)
    file = next((part for part in (folder, *folder.parents) if part.exists() and not part.is_dir()), None)
    if file is not None:
        where = "" if file == folder else f"; {folder} cannot be made below it"
        yield Finding(name, "failed", f"{file} is a file{where}", "give --output a folder")
        return
    missing = _missing(folder)
    path = f".doctor-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        problem = _use(store, path)
    except (OSError, ApacsError) as error:
        reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        place = existing_parent(folder)
        message = f"{folder}: cannot be written in ({reason}; uid {os.geteuid()})"
        yield Finding(name, "failed", message, f"chown or chmod u+rwx '{place}', or choose another --output")
        return
    finally:
        _remove(folder, path, missing)
    if problem:
        advice = "choose an --output on a local or NFS 4 disk: the run's lock needs hard links and file locks"
        yield Finding(name, "failed", f"{folder}: {problem}", advice)
    else:
        new = " (it would be made)" if missing else ""
        yield Finding(name, "ok", f"{folder}: creates, replaces, lists, reads and deletes{new}")


def _use(store: LocalStore, path: str) -> str | None:
    """Do what a run and its lock do; return what did not work in words, None when all did."""
    try:
        version = store.create(path, CONTENT)
    except OSError as error:
        if error.errno in NO_LINKS:
            return f"no file can be linked ({error.strerror})"
        raise
    try:
        store.create(path, CONTENT)
        return "an exclusive create of a file that exists was not refused"
    except Conflict:
        pass
    try:
        store.replace(path, CONTENT + b"\n", version)
    except OSError as error:
        return f"no file can be locked ({error.strerror})"
    if path not in {entry.name for entry in os.scandir(store.root)} or store.read(path) != CONTENT + b"\n":
        return "a file just written is not there, or differs"
    return None


def _missing(folder: Path) -> list[Path]:
    """Return the folders that do not exist yet, from `folder` upwards."""
    place = existing_parent(folder)
    return [part for part in (folder, *folder.parents) if place in part.parents]


def _remove(folder: Path, path: str, made: list[Path]) -> None:
    for left in folder.glob(f".*{path}*") if folder.is_dir() else ():  # the file, its lock guard, unfinished writes
        left.unlink(missing_ok=True)
    (folder / path).unlink(missing_ok=True)
    for part in made:
        try:
            part.rmdir()
        except OSError:  # not made, or somebody uses it by now
            continue
