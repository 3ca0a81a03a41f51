"""libvips, opened so that nothing it reads is silently wrong: strict, and never from its memory of an earlier file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("VIPS_CONCURRENCY", "1")  # Ray runs a process a core; threads on top of that only cost memory

import pyvips

from apacs_ray.errors import BadInput

pyvips.cache_set_max(0)  # the cache answers by path: a file replaced under its name would be read as the old one


def open_vips(path: Path, **options: Any) -> pyvips.Image:
    """An image for random access; `options` are the loader's (page, subifd).

    libtiff's decoding errors are warnings to libvips, so warnings fail here; they do so when the pixels are read.
    Raises BadInput (unreadable).
    """
    try:
        return pyvips.Image.new_from_file(str(path), access="random", fail_on="warning", **options)
    except pyvips.Error as error:
        raise BadInput("unreadable", f"{path.name}: {reason(error)}") from error


def reason(error: pyvips.Error) -> str:
    """libvips' own words in one line."""
    lines = [line.strip() for line in str(error.detail or error.message).splitlines() if line.strip()]
    return "; ".join(dict.fromkeys(lines))[:300] or "libvips cannot read it"
