"""Exact tiling: the cores of a slide, the windows that networks see of them, and the lattice on which glass is cut out.

Networks that are local, and shift-invariant by 32 px, give each pixel of a core the logit that the whole slide would
give it, if the window around the core holds all that the pixel depends on (the halo) and begins at a multiple of 32 px.
Nothing overlaps in the result, and nothing is blended. All coordinates are px of the segmented resolution, from the
corner of the slide's bounds on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from apacs_ray.data.grid import Box, grid

ALIGN = 32  # px, the coarsest stride of the networks; also a cell of the lattice
Lattice = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Core:
    """A part of a slide whose mask is final once its window was seen.

    Attributes:
        number: In reading order over all cores of the slide, those without tissue too.
        box: What is kept.
        window: What the networks see; None where no cell of the lattice is wanted.
    """

    number: int
    box: Box
    window: Box | None


def cores_of(width: int, height: int, side: int, halo: int, wanted: Lattice) -> Iterator[Core]:
    """Yield the cores of a slide in reading order.

    Args:
        width: Of the slide, px.
        height: Of the slide, px.
        side: Of a core, a multiple of `ALIGN`; cores at the right and lower edge may be smaller.
        halo: px around what is kept, a multiple of `ALIGN`.
        wanted: (ceil(height / 32), ceil(width / 32)) bool, the cells that are segmented.

    Yields:
        A core, the last ones smaller.
    """
    for number, box in enumerate(grid(width, height, side, side, "keep")):
        yield Core(number, box, _window(box, halo, wanted, width, height))


def cells_of(box: Box) -> tuple[slice, slice]:
    """Return the rows and columns of the lattice that a box meets."""
    return (
        slice(box.y // ALIGN, -(-(box.y + box.height) // ALIGN)),
        slice(box.x // ALIGN, -(-(box.x + box.width) // ALIGN)),
    )


def spread(cells: Lattice, box: Box) -> npt.NDArray[np.bool_]:
    """Return the cells of the lattice below a box, as (height, width) px of it."""
    rows, columns = cells_of(box)
    px = cells[rows, columns].repeat(ALIGN, axis=0).repeat(ALIGN, axis=1)
    top, left = box.y % ALIGN, box.x % ALIGN
    return px[top : top + box.height, left : left + box.width]


def _window(box: Box, halo: int, wanted: Lattice, width: int, height: int) -> Box | None:
    """Return the wanted cells of a core with the halo around them, within the slide."""
    rows, columns = cells_of(box)
    inside = wanted[rows, columns]
    if not inside.any():
        return None
    down, across = np.flatnonzero(inside.any(axis=1)), np.flatnonzero(inside.any(axis=0))
    left = max((columns.start + int(across[0])) * ALIGN - halo, 0)
    top = max((rows.start + int(down[0])) * ALIGN - halo, 0)
    right = min((columns.start + int(across[-1]) + 1) * ALIGN + halo, width)
    bottom = min((rows.start + int(down[-1]) + 1) * ALIGN + halo, height)
    return Box(left, top, right - left, bottom - top)
