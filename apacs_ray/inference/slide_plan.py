"""The plan of a slide's segmentation: its size at the networks' resolution, and the cells of the lattice to look at.

It is made once, before any core is read, and kept beside the parts: a run that goes on cuts the slide the same way.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice

import numpy as np
import shapely
from shapely.geometry import Polygon

from apacs_ray.data.grid import Box
from apacs_ray.inference.cores import ALIGN, Core, Lattice, cores_of
from apacs_ray.inference.parts import encode_strip, strip_of
from apacs_ray.slides.tissue import ASSUMED_MPP, Tissue
from apacs_ray.storage import Store

MARGIN = 50.0  # um around tissue that are looked at, too: more than the rim of a pale cell
PLAN, CELLS = "plan.json", "cells.bin"


@dataclass(frozen=True)
class SlidePlan:
    """How a slide is cut.

    Attributes:
        slide_id: Its name in the output.
        engine: That reads it.
        width: px at the segmented resolution.
        height: Likewise.
        downsample: Level-0 px per px of that.
        mpp: um per level-0 px, None where unknown.
        bounds: The scanned part, level-0 px.
        core: Side of a core, px.
        halo: px around it.
        shard: Cores of a shard, those without tissue not counted.
        shards: How many there are.
        cores: Cores to read.
        notes: What a person should know of how the slide is read.
    """

    slide_id: str
    engine: str
    width: int
    height: int
    downsample: float
    mpp: float | None
    bounds: Box
    core: int
    halo: int
    shard: int
    shards: int = 0
    cores: int = 0
    notes: tuple[str, ...] = ()

    @property
    def output_mpp(self) -> float | None:
        """The um per px of the mask."""
        return None if self.mpp is None else self.mpp * self.downsample

    def to_json(self) -> str:
        """Return the text of `plan.json`."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> SlidePlan:
        """Return the plan of such a text."""
        tree = json.loads(text)
        return cls(**{**tree, "bounds": Box(**tree["bounds"]), "notes": tuple(tree["notes"])})

    def least_px(self, um2: float) -> float:
        """Return an area as px of the mask; where the um per px are not known, 0."""
        return 0.0 if self.output_mpp is None else um2 / self.output_mpp**2

    def cores_in(self, shard: int) -> int:
        """Return how many cores a shard has."""
        return min(self.shard, self.cores - shard * self.shard)

    def all_cores(self, cells: Lattice) -> Iterator[Core]:
        """Yield every core of the slide, in reading order."""
        return cores_of(self.width, self.height, self.core, self.halo, cells)

    def shard_cores(self, cells: Lattice, number: int) -> list[Core]:
        """Return the cores of a shard."""
        wanted = (core for core in self.all_cores(cells) if core.window is not None)
        return list(islice(wanted, number * self.shard, (number + 1) * self.shard))


def finished_plan(plan: SlidePlan, cells: Lattice) -> SlidePlan:
    """Return the plan with its cores counted."""
    cores = sum(core.window is not None for core in plan.all_cores(cells))
    return replace(plan, cores=cores, shards=-(-cores // plan.shard))


def tissue_cells(tissue: Tissue, plan: SlidePlan) -> Lattice:
    """Return the cells of the lattice with tissue in them, or within `MARGIN` of them."""
    margin = MARGIN / (plan.mpp or ASSUMED_MPP)  # level-0 px
    down, across = lattice_size(plan.width, plan.height)
    cell = ALIGN * plan.downsample
    rows = _spans(plan.bounds.y, down, cell, margin, tissue.downsample, tissue.mask.shape[0])
    columns = _spans(plan.bounds.x, across, cell, margin, tissue.downsample, tissue.mask.shape[1])
    sums = np.zeros((tissue.mask.shape[0] + 1, tissue.mask.shape[1] + 1), np.int64)
    sums[1:, 1:] = tissue.mask.cumsum(axis=0, dtype=np.int64).cumsum(axis=1)
    (top, foot), (left, right) = rows, columns
    inside = sums[foot][:, right] - sums[top][:, right] - sums[foot][:, left] + sums[top][:, left]
    return np.asarray(inside > 0)


def area_cells(areas: Sequence[Polygon], plan: SlidePlan) -> Lattice:
    """Return the cells of the lattice that areas (level-0 px) meet."""
    down, across = lattice_size(plan.width, plan.height)
    cells = np.zeros((down, across), bool)
    cell = ALIGN * plan.downsample
    for area in areas:
        shapely.prepare(area)
        left, top, right, bottom = area.bounds
        first = max(int((left - plan.bounds.x) // cell), 0), max(int((top - plan.bounds.y) // cell), 0)
        last = (
            min(int((right - plan.bounds.x) // cell) + 1, across),
            min(int((bottom - plan.bounds.y) // cell) + 1, down),
        )
        for row in range(first[1], last[1]):
            columns = np.arange(first[0], max(last[0], first[0]))
            x, y = plan.bounds.x + columns * cell, np.full(len(columns), plan.bounds.y + row * cell)
            cells[row, columns] |= shapely.intersects(area, shapely.box(x, y, x + cell, y + cell))
    return cells


def lattice_size(width: int, height: int) -> tuple[int, int]:
    """Return rows and columns of the lattice over a slide."""
    return -(-height // ALIGN), -(-width // ALIGN)


def write_plan(store: Store, folder: str, plan: SlidePlan, cells: Lattice) -> None:
    """Keep a plan in a folder of the output; `plan.json` is written last."""
    store.write(f"{folder}/{CELLS}", encode_strip(cells))
    store.write(f"{folder}/{PLAN}", plan.to_json().encode())


def read_plan(store: Store, folder: str) -> SlidePlan | None:
    """Return the plan in a folder; None where there is none."""
    try:
        return SlidePlan.from_json(store.read(f"{folder}/{PLAN}").decode())
    except FileNotFoundError:
        return None


def read_cells(store: Store, folder: str, plan: SlidePlan) -> Lattice:
    """Return the cells of the lattice that a plan looks at."""
    return strip_of(store.read(f"{folder}/{CELLS}"), lattice_size(plan.width, plan.height)[1])


def _spans(
    begin: int, cells: int, cell: float, margin: float, downsample: float, length: int
) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """The px of the small picture that each cell covers with its margin: the first, and the one after the last."""
    starts = begin + np.arange(cells) * cell
    first = np.floor((starts - margin) / downsample).astype(np.int64).clip(0, length)
    last = np.ceil((starts + cell + margin) / downsample).astype(np.int64).clip(0, length)
    return first, last
