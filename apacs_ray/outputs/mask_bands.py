"""The mask of a slide from the strips of its cores, band by band from top to bottom."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from apacs_ray.inference.parts import STRIP, strip_of
from apacs_ray.outputs.ome_tiff import TILE

Band = npt.NDArray[np.uint8]


def mask_bands(cores: Iterable[dict[str, Any]], width: int, height: int) -> Iterator[Band]:
    """Yield the mask of a slide.

    Args:
        cores: x, y, width, height and mask of its cores, in reading order; what is not there is background.
        width: Of the slide, px.
        height: Of the slide, px.

    Returns:
        Bands, (512, width) uint8 of 0 and 255; the last one is as high as what is left.
    """
    return _of_height(_strips(cores, width, height), TILE)


def _strips(cores: Iterable[dict[str, Any]], width: int, height: int) -> Iterator[Band]:
    """Bands as high as the strips of the cores below them."""
    done = 0
    for top, row_of_cores in groupby(cores, key=lambda core: core["y"]):
        row = list(row_of_cores)
        if top > done:
            yield from _background(top - done, width)
        done = top + row[0]["height"]
        for number in range(-(-row[0]["height"] // STRIP)):
            band = np.zeros((min(STRIP, row[0]["height"] - number * STRIP), width), np.uint8)
            for core in row:
                if core["mask"]:
                    strip = strip_of(core["mask"][number], core["width"])
                    band[:, core["x"] : core["x"] + core["width"]] = strip * np.uint8(255)
            yield band
    yield from _background(height - done, width)


def _background(rows: int, width: int) -> Iterator[Band]:
    for top in range(0, rows, TILE):
        yield np.zeros((min(TILE, rows - top), width), np.uint8)


def _of_height(bands: Iterator[Band], rows: int) -> Iterator[Band]:
    """The same rows in bands of `rows`, at least as high as any that comes."""
    waiting: list[Band] = []
    count = 0
    for band in bands:
        waiting.append(band)
        count += len(band)
        if count >= rows:
            whole = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
            yield whole[:rows]
            waiting, count = [whole[rows:]], count - rows
    if count:
        yield np.concatenate(waiting)
