"""Peak resident memory of a process that makes the files of a segmented slide, by the slide's size: it must not grow.

The parts of the slide are one core's, repeated: the cells of a synthetic smear. Each measurement is a fresh process,
which joins objects over cores and writes the mask, GeoJSON, GeoParquet and overview, as a task of `segment` does.
"""

from __future__ import annotations

import io
import multiprocessing
import sys
import tempfile
import time
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
SHARD = 4  # cores of a part, as `stages.segment` has them of this size
LARGEST_RATIO = 1.2  # of the larger slide's peak to the smaller one's


def main() -> None:
    """Measure the peak memory by slide size and fail when it grows."""
    arguments = options(__doc__ or "", "the same: it is quick").parse_args()
    core, sides = (256, (512, 1024)) if arguments.smoke else (CORE, SIDES)
    _, mask = render(slide_specs(0, core, core, train=1, test=0)[0])
    rows: list[dict[str, Any]] = []
    for side in sides:
        with tempfile.TemporaryDirectory() as folder:
            plan = _write_parts(folder, side, core, mask)
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                seconds, peak, found = pool.apply(_assemble, (folder, plan))
        require(found.pixels == int(mask.sum()) * plan.cores, f"{side} px: {found.pixels} px of cells")
        row = {"slide": f"{side} px", "cores": plan.cores, "objects": found.objects, "s": seconds, "peak_MB": peak}
        rows.append({**row, "ratio": peak / rows[0]["peak_MB"] if rows else 1.0})
    show("peak memory of a process that writes a slide's files", rows, arguments.json)
    require(all(row["ratio"] <= LARGEST_RATIO for row in rows), "it grows with the slide")


def _write_parts(folder: str, side: int, core: int, mask: np.ndarray) -> SlidePlan:
    """Write a slide of equal cores; return its plan."""
    store = LocalStore(folder)
    cells = np.ones(lattice_size(side, side), bool)
    bounds = Box(0, 0, side, side)
    plan = finished_plan(SlidePlan("slide", "none", side, side, 1.0, 0.25, bounds, core, halo=0, shard=SHARD), cells)
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
