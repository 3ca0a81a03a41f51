"""Folders and files under names that others could guess, as in /tmp, which must be this user's own."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from apacs_ray.errors import ApacsError


def own_folder(path: str | Path) -> Path:
    """Make the folder, for this user alone, or take it as it is when it is that already. Raises ApacsError.

    Another user may have made it, or a link of its name, to read what is put there or to put in what is then read.
    """
    folder = Path(path)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise ApacsError(f"{folder}: is a link, another user's, or others may write there; remove it, then start again")
    return folder


def open_own_file(path: Path) -> BinaryIO:
    """Open a file to lock it, make it if need be. Raises ApacsError for a link: it leads elsewhere."""
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+b")
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ApacsError(f"{path}: a link, which no run makes there; remove it, then start again") from error
