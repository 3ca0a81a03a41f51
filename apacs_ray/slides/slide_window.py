"""Windows of a slide at the resolution of the networks, whose pixels do not depend on where the window begins.

Where the slide has a level of that resolution, its pixels are taken as they are. Else they are resampled on a fixed
lattice of blocks, from source rectangles that stay fractional: the same block gives the same pixels to every window.
"""

from __future__ import annotations

import numpy as np

from apacs_ray.data.grid import Box
from apacs_ray.data.images import Rgb
from apacs_ray.slides.reader import Slide, read_rectangle
from apacs_ray.slides.slide_grid import grid_size

BLOCK = 256  # px of the lattice on which is resampled


def read_window(slide: Slide, window: Box, downsample: float) -> Rgb:
    """Read a window of a slide.

    Args:
        slide: Open.
        window: px of the wanted resolution, from the corner of the slide's bounds on; within the slide's grid.
        downsample: Level-0 px per px of the window.

    Returns:
        (height, width, 3) uint8.

    Raises:
        BadInput: unreadable_region; the file is damaged there.
    """
    bounds = slide.info.bounds
    level = slide.info.levels[slide.info.level_for(downsample)]
    left, top = (bounds.x / level.downsample, bounds.y / level.downsample)
    if abs(downsample / level.downsample - 1) < 1e-6 and left == round(left) and top == round(top):
        number = slide.info.level_for(downsample)
        return slide.read(number, round(left) + window.x, round(top) + window.y, window.width, window.height)
    width, height = grid_size(bounds, downsample)
    rgb = np.empty((window.height, window.width, 3), np.uint8)
    for y in range(window.y // BLOCK * BLOCK, window.y + window.height, BLOCK):
        for x in range(window.x // BLOCK * BLOCK, window.x + window.width, BLOCK):
            wide, high = min(BLOCK, width - x), min(BLOCK, height - y)
            block = np.asarray(
                read_rectangle(slide, bounds.x + x * downsample, bounds.y + y * downsample, downsample, wide, high)
            )
            a, b = max(x, window.x), max(y, window.y)
            c, d = min(x + wide, window.x + window.width), min(y + high, window.y + window.height)
            rgb[b - window.y : d - window.y, a - window.x : c - window.x] = block[b - y : d - y, a - x : c - x]
    return rgb
