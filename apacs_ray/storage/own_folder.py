"""Folders and files under names that others could guess, as in /tmp, which must be this user's own."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from apacs_ray.errors import ApacsError


def own_folder(path: str | Path) -> Path:
    """Make a folder for this user alone, or take one that already is.

    Another user may have made it, or a link of its name, to read what is put there or to put in what is then read.

    Args:
        path: Of the folder; those above it are made too.

    Returns:
        The folder.

    Raises:
        ApacsError: It is a link, belongs to another user, or others may write there.
    """
    folder = Path(path)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ApacsError(f"{folder}: is a link, another user's, or others may write there; remove it, then start again")
    return folder


def open_own_file(path: Path) -> BinaryIO:
    """Open a file to lock it; make it where there is none. Raises ApacsError for a link, which leads elsewhere."""
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+b")
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ApacsError(f"{path}: a link, which no run makes there; remove it, then start again") from error
