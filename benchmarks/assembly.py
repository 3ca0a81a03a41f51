"""Peak resident memory of a process that makes the files of a segmented slide: it must not grow with its size.

The parts of the slide are one core's, repeated. By its sides: the cells of a synthetic smear. By the number of objects:
spots of 10 px every 16 px, on a slide as wide and ten times as high. Each measurement is a fresh process that joins
objects over cores and writes the mask, GeoJSON, GeoParquet and overview, as a task of `segment` does.
"""

from __future__ import annotations

import io
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import shapely
from measure import options, peak_resident, require, show
from PIL import Image

from apacs_ray.config.settings import SegmentSettings
from apacs_ray.data.grid import Box
from apacs_ray.inference.objects import CoreObjects, core_objects
from apacs_ray.inference.parts import FinishedCore, part_path, write_part
from apacs_ray.inference.planning import PICTURE
from apacs_ray.inference.slide_plan import SlidePlan, finished_plan, lattice_size, write_plan
from apacs_ray.outputs.slide_files import Found, write_slide_files
from apacs_ray.storage import LocalStore
from apacs_ray.synthetic.slide import render, slide_specs

CORE = 2048  # px
SIDES = (10_240, 40_960)
SPOTS_CORE, SPOT, PITCH = 1024, 10, 16  # px
SPOTS = ((4096, 3072), (4096, 31_744))  # px, width and height: 49 152 and 507 904 spots, less what meets at borders
SHARD = 4  # cores of a part, as `stages.segment` has them of this size
LARGEST_RATIO = 1.2  # of the larger slide's peak to the smaller one's


def main() -> None:
    """Measure the peak memory by slide size and by objects, and fail when it grows."""
    arguments = options(__doc__ or "", "only by the slide's sides").parse_args()
    core, sides, spots_core, spots = CORE, SIDES, SPOTS_CORE, () if arguments.quick else SPOTS
    if arguments.smoke:
        core, sides, spots_core, spots = 256, (512, 1024), 128, ((256, 256), (256, 1024))
    _, cells = render(slide_specs(0, core, core, train=1, test=0)[0])
    rows = _measure([(side, side) for side in sides], core, cells) + _measure(spots, spots_core, _spots(spots_core))
    show("peak memory of a process that writes a slide's files", rows, arguments.json)
    require(all(row["ratio"] <= LARGEST_RATIO for row in rows), "it grows with the slide")


def _measure(sizes: Sequence[tuple[int, int]], core: int, mask: np.ndarray) -> list[dict[str, Any]]:
    """Return a row for each size of a slide, whose cores are all alike."""
    rows: list[dict[str, Any]] = []
    for width, height in sizes:
        with tempfile.TemporaryDirectory() as folder:
            plan = _write_parts(folder, width, height, core, mask)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, peak, found = pool.apply(_assemble, (folder, plan))
        require(found.pixels == int(mask.sum()) * plan.cores, f"{width} x {height} px: {found.pixels} px of cells")
        row = {"slide": f"{width} x {height} px", "cores": plan.cores, "objects": found.objects}
        rows.append({**row, "s": seconds, "peak_MB": peak, "ratio": peak / rows[0]["peak_MB"] if rows else 1.0})
    return rows


def _spots(core: int) -> np.ndarray:
    """Return a mask (core, core) of round objects, of which some lie across its borders."""
    away = (np.arange(core) + PITCH // 2) % PITCH - PITCH // 2 + 0.5
    return np.asarray(away[:, None] ** 2 + away**2 <= (SPOT / 2) ** 2)


def _write_parts(folder: str, width: int, height: int, core: int, mask: np.ndarray) -> SlidePlan:
    """Write a slide of equal cores; return its plan."""
    store = LocalStore(folder)
    cells = np.ones(lattice_size(width, height), bool)
    bounds = Box(0, 0, width, height)
    plan = finished_plan(SlidePlan("slide", "none", width, height, 1.0, 0.25, bounds, core, halo=0, shard=SHARD), cells)
    values = np.full(mask.shape, 50_000, np.uint16)
    first = core_objects(mask, values, values // 4, Box(0, 0, core, core))
    for shard in range(plan.shards):
        boxes = ((one.number, one.box) for one in plan.shard_cores(cells, shard))
        row = [FinishedCore(number, box, mask, _moved(first, box)) for number, box in boxes]
        write_part(store, part_path("parts", shard), row)
    sink = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(sink, "png")
    store.write(f"parts/{PICTURE}", sink.getvalue())
    write_plan(store, "parts", plan, cells)
    return plan


def _moved(objects: CoreObjects, box: Box) -> CoreObjects:
    """Return the objects of the core at the slide's corner as they are in another."""
    pieces = tuple(
        replace(
            piece,
            polygon=shapely.transform(piece.polygon, lambda points: np.add(points, (box.x, box.y))),
            first=(piece.first[0] + box.y, piece.first[1] + box.x),
        )
        for piece in objects.pieces
    )
    return CoreObjects(box, pieces, objects.edges)


def _assemble(folder: str, plan: SlidePlan) -> tuple[float, float, Found]:
    """Write the slide's files; return seconds, this process's peak memory in MB, and what was found."""
    began = time.perf_counter()
    found = write_slide_files(LocalStore(folder), "parts", plan, SegmentSettings(), {})
    return time.perf_counter() - began, peak_resident(), found


if __name__ == "__main__":
    main()
