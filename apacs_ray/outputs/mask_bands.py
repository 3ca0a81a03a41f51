"""The mask of a slide, and its maps, from the strips of its cores, band by band from top to bottom."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
from shapely.geometry import MultiPolygon, Polygon

from apacs_ray.inference.objects import paint
from apacs_ray.inference.parts import STRIP, map_strip_of, strip_of
from apacs_ray.outputs.ome_tiff import TILE

Band = npt.NDArray[np.uint8]
Change = tuple[Polygon | MultiPolygon, bool]  # px of a slide, and whether they are cell


def mask_bands(
    cores: Iterable[dict[str, Any]], width: int, height: int, changes: Sequence[Change] = ()
) -> Iterator[Band]:
    """Yield the mask of a slide.

    Args:
        cores: x, y, width, height and mask of its cores, in reading order; what is not there is background.
        width: Of the slide, px.
        height: Of the slide, px.
        changes: Areas that are all cell, or all background, whatever the cores say.

    Returns:
        Bands, (512, width) uint8 of 0 and 255; the last one is as high as what is left.
    """

    def strip(content: bytes, wide: int) -> Band:
        return strip_of(content, wide) * np.uint8(255)

    bands = _of_height(_strips(cores, "mask", 1, width, height, strip), TILE)
    return _changed(bands, changes) if changes else bands


def map_bands(cores: Iterable[dict[str, Any]], name: str, downsample: int, width: int, height: int) -> Iterator[Band]:
    """Yield a map of a slide.

    Args:
        cores: x, y, width, height and the map of its cores, in reading order; what is not there is 0.
        name: Of the map's column.
        downsample: px of the slide per px of the map.
        width: Of the slide, px.
        height: Of the slide, px.

    Returns:
        Bands, (512, ceil(width / downsample)) uint8; the last one is as high as what is left.
    """
    return _of_height(_strips(cores, name, downsample, width, height, map_strip_of), TILE)


def _strips(
    cores: Iterable[dict[str, Any]],
    column: str,
    downsample: int,
    width: int,
    height: int,
    decode: Callable[[bytes, int], Band],
) -> Iterator[Band]:
    """Bands as high as the strips of the cores below them. Cores begin at multiples of `downsample`."""

    def scaled(side: int) -> int:
        return -(-side // downsample)

    done, across = 0, scaled(width)
    for top, row_of_cores in groupby(cores, key=lambda core: core["y"]):
        row = list(row_of_cores)
        if scaled(top) > done:
            yield from _background(scaled(top) - done, across)
        high = scaled(row[0]["height"])
        done = scaled(top) + high
        for number in range(-(-high // STRIP)):
            band = np.zeros((min(STRIP, high - number * STRIP), across), np.uint8)
            for core in row:
                if core[column]:
                    left, wide = scaled(core["x"]), scaled(core["width"])
                    band[:, left : left + wide] = decode(core[column][number], wide)
            yield band
            del band  # before the next one is made
    yield from _background(scaled(height) - done, across)


def _changed(bands: Iterator[Band], changes: Sequence[Change]) -> Iterator[Band]:
    """Bands with some areas painted."""
    waiting = sorted(changes, key=lambda change: change[0].bounds[1])  # by where they begin
    begun: list[Change] = []
    top = place = 0
    for band in bands:
        while place < len(waiting) and waiting[place][0].bounds[1] < top + len(band):
            begun.append(waiting[place])
            place += 1
        if begun:
            mask = band > 0
            for area, value in begun:
                paint(mask, area, 0, top, value)
            band = mask * np.uint8(255)
        top += len(band)
        begun = [change for change in begun if change[0].bounds[3] > top]
        yield band


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
        del band  # before the next one is made: they are as wide as the slide
        if count < rows:
            continue
        whole = waiting.pop() if len(waiting) == 1 else np.concatenate(waiting)
        count -= rows
        waiting = [whole[rows:].copy()] if count else []
        whole = whole[:rows]
        yield whole
        del whole
    if count:
        yield np.concatenate(waiting)
