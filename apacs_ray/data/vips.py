"""libvips, opened so that nothing it reads is silently wrong: strict, and never from its memory of an earlier file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("VIPS_CONCURRENCY", "1")  # Ray runs a process a core; threads on top of that only cost memory

import pyvips

from apacs_ray.errors import BadInput

pyvips.cache_set_max(0)  # the cache answers by path: a file replaced under its name would be read as the old one


def open_vips(source: Path | bytes, **options: Any) -> pyvips.Image:
    """Open an image for random access, of a local file or from memory.

    libtiff's decoding errors are warnings to libvips, so warnings fail here; they do so when the pixels are read.

    Args:
        source: the file.
        **options: the loader's (page, subifd).

    Returns:
        The image.

    Raises:
        BadInput: unreadable.
    """
    options |= {"access": "random", "fail_on": "warning"}
    try:
        if isinstance(source, bytes):
            return pyvips.Image.new_from_buffer(source, "", **options)
        return pyvips.Image.new_from_file(str(source), **options)
    except pyvips.Error as error:
        name = "" if isinstance(source, bytes) else f"{source.name}: "
        raise BadInput("unreadable", f"{name}{reason(error)}") from error


def reason(error: pyvips.Error) -> str:
    """Return libvips' own words in one line."""
    lines = [line.strip() for line in str(error.detail or error.message).splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines))[:300] or "libvips cannot read it"
