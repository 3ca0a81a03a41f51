"""The three steps of segmenting a shard of cores, as tables: windows are read, networks run, objects found and written.

Ray runs them on different machines (`distributed/segment.py`); here they are plain functions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from apacs_ray.config.settings import SegmentSettings
from apacs_ray.data.columns import bytes_in
from apacs_ray.data.grid import Box
from apacs_ray.data.images import Mask
from apacs_ray.data.rejects import Reject
from apacs_ray.data.units import one_unit
from apacs_ray.errors import BadInput
from apacs_ray.inference.cores import Core, Lattice, spread
from apacs_ray.inference.holes import fill_holes
from apacs_ray.inference.objects import core_objects, without_small
from apacs_ray.inference.parts import MAPS, FinishedCore, map_of, part_path, write_part
from apacs_ray.inference.slide_plan import SlidePlan, read_cells
from apacs_ray.slides.manifest import SlideTask, opened_slide
from apacs_ray.slides.slide_files import SlideFiles
from apacs_ray.slides.slide_window import read_window
from apacs_ray.storage import Store

STAGE = "segment"  # of rejects


@dataclass(frozen=True)
class SegmentTask:
    """What the segmentation of all slides has in common.

    Attributes:
        model: Where the networks are.
        folders: Model key -> folder there.
        output: Where results go.
        settings: How is segmented.
    """

    model: Store
    folders: Mapping[str, str]
    output: Store
    settings: SegmentSettings


@dataclass(frozen=True)
class PlannedSlide:
    """A slide to segment: how it is read, its plan, where its parts go, and which shards are there already."""

    files: SlideFiles
    reading: SlideTask
    plan: SlidePlan
    parts: str
    done: frozenset[int] = field(default_factory=frozenset)

    @property
    def missing(self) -> list[int]:
        """Shards to make."""
        return [number for number in range(self.plan.shards) if number not in self.done]


WINDOW_SCHEMA = pa.schema(
    [
        ("slide", pa.int64()),
        ("shard", pa.int64()),
        ("core", pa.string()),
        ("halo", pa.int32()),
        ("rgb", pa.large_binary()),  # null: it cannot be read
        ("reject", pa.string()),
        ("read_s", pa.float64()),
    ]
)
MASK_SCHEMA = pa.schema(
    [
        *(WINDOW_SCHEMA.field(name) for name in ("slide", "shard", "core", "reject", "read_s")),
        ("mask", pa.large_binary()),
        *((name, pa.large_binary()) for name in MAPS),
        ("networks_s", pa.float64()),
    ]
)
RECEIPT_SCHEMA = pa.schema(
    [
        ("slide", pa.int64()),
        ("cores", pa.int64()),
        ("read", pa.float64()),
        ("networks", pa.float64()),
        ("objects", pa.float64()),
    ]
)


def read_windows(task: SegmentTask, slide: PlannedSlide, number: int, shard: int) -> pa.Table:
    """Read the windows of a shard; one that is damaged is its core's reject.

    Args:
        task: What all slides have in common.
        slide: To read.
        number: Of the slide.
        shard: Of the slide.

    Returns:
        Rows of `WINDOW_SCHEMA`, a core each.
    """
    cells = _cells(task.output, slide)
    rows: list[dict[str, Any]] = []
    cores = slide.plan.shard_cores(cells, shard)
    try:
        with one_unit(slide.files.path, again=True), opened_slide(slide.reading, slide.files) as reader:
            for core in cores:
                assert core.window is not None
                row = _row(slide, number, shard, core)
                began = time.perf_counter()
                try:
                    with one_unit(f"{slide.files.path} at {core.box.x}, {core.box.y}", again=True):
                        row["rgb"] = read_window(reader, core.window, slide.plan.downsample).tobytes()
                except BadInput as defect:
                    row["reject"] = _reject(slide, core, defect)
                rows.append({**row, "read_s": time.perf_counter() - began})
    except BadInput as defect:  # it opened when it was planned, and does not now
        rows += [
            {**_row(slide, number, shard, core), "read_s": 0.0, "reject": _reject(slide, core, defect)}
            for core in cores[len(rows) :]
        ]
    return pa.Table.from_pylist(rows, WINDOW_SCHEMA)


class RunNetworks:
    """The networks, loaded once: windows in, masks of cores out (`MASK_SCHEMA`)."""

    def __init__(self, task: SegmentTask) -> None:
        """Load what `task` names."""
        from apacs_ray.inference.predictor import Predictor
        from apacs_ray.inference.segmenter import Segmenter

        how = task.settings
        predictor = Predictor.load(task.model, task.folders, threads=how.threads, precision=how.precision)
        self._segment = Segmenter(predictor, how.use, threshold=how.threshold, tta=how.tta)

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return rows of `MASK_SCHEMA` for those of `WINDOW_SCHEMA`, in their order."""
        rows = []
        for number, pixels in enumerate(bytes_in(block["rgb"])):
            row = block.slice(number, 1).select(["slide", "shard", "core", "reject", "read_s"]).to_pylist()[0]
            core = _decoded(row["core"])
            began = time.perf_counter()
            if pixels is not None:
                window = core.window
                assert window is not None
                rgb = pixels.reshape(window.height, window.width, 3)
                seen = _seen(core)
                keep = Box(seen.x - window.x, seen.y - window.y, seen.width, seen.height)
                found = self._segment(rgb, keep, block["halo"][number].as_py())
                row |= {
                    "mask": np.packbits(found.mask).tobytes(),
                    "probability": found.probability.tobytes(),
                    "disagreement": found.disagreement.tobytes(),
                }
            rows.append({**row, "networks_s": time.perf_counter() - began})
        return pa.Table.from_pylist(rows, MASK_SCHEMA)


def finish_shard(task: SegmentTask, slides: Sequence[PlannedSlide], block: pa.Table) -> pa.Table:
    """Find the objects of a shard, and write it.

    Args:
        task: What all slides have in common.
        slides: By number.
        block: Rows of `MASK_SCHEMA`, of one shard.

    Returns:
        A row of `RECEIPT_SCHEMA`.
    """
    first = block.slice(0, 1).select(["slide", "shard"]).to_pylist()[0]
    slide = slides[first["slide"]]
    began = time.perf_counter()
    cores = [_finished(task.settings, slide, _cells(task.output, slide), block.slice(n, 1)) for n in range(len(block))]
    write_part(task.output, part_path(slide.parts, first["shard"]), cores)
    receipt = {
        "slide": first["slide"],
        "cores": len(cores),
        "read": sum(block["read_s"].to_pylist()),
        "networks": sum(block["networks_s"].to_pylist()),
        "objects": time.perf_counter() - began,
    }
    return pa.Table.from_pylist([receipt], RECEIPT_SCHEMA)


def _finished(settings: SegmentSettings, slide: PlannedSlide, cells: Lattice, row: pa.Table) -> FinishedCore:
    """A core with its objects, of a row of `MASK_SCHEMA`."""
    core = _decoded(row["core"][0].as_py())
    box = core.box
    mask = np.zeros((box.height, box.width), bool)
    values = {name: np.zeros((box.height, box.width), np.uint16) for name in MAPS}
    reject = None
    if row["mask"][0].is_valid:
        seen = _seen(core)
        part, shape = _within(seen, box), (seen.height, seen.width)
        bits = np.frombuffer(row["mask"][0].as_buffer(), np.uint8)
        found = np.unpackbits(bits, count=seen.height * seen.width).reshape(shape).astype(bool)
        mask[part] = found & spread(cells, seen)
        for name, target in values.items():
            target[part] = np.frombuffer(row[name][0].as_buffer(), np.uint16).reshape(shape)
    else:
        reject = Reject(**json.loads(row["reject"][0].as_py()))
    return finished_core(core.number, box, mask, values, slide.plan, settings, reject)


def finished_core(
    number: int,
    box: Box,
    mask: Mask,
    values: Mapping[str, npt.NDArray[np.uint16]],
    plan: SlidePlan,
    settings: SegmentSettings,
    reject: Reject | None = None,
) -> FinishedCore:
    """Find the objects of a core, and change its mask as settings ask.

    Args:
        number: Of the core.
        box: Where it lies.
        mask: (H, W) bool, what the networks call cell.
        values: (H, W) uint16 by the names of `MAPS`, in 1 / `STEPS`.
        plan: Of the slide.
        settings: Of the segmentation.
        reject: Why the slide could not be read there.

    Returns:
        The core as it is written.
    """
    objects = core_objects(mask, values["probability"], values["disagreement"], box)
    mask, objects = fill_holes(mask, objects, plan.least_px(settings.fill_holes_um2))
    mask, objects = without_small(mask, objects, plan.least_px(settings.min_area_um2))
    maps = {} if settings.maps is None else {name: map_of(values[name], settings.maps) for name in MAPS}
    return FinishedCore(number, box, mask, objects, reject, maps)


def _cells(output: Store, slide: PlannedSlide) -> Lattice:
    return _cells_of(output, slide.parts, slide.plan)


@lru_cache(maxsize=8)
def _cells_of(output: Store, parts: str, plan: SlidePlan) -> Lattice:
    return read_cells(output, parts, plan)


def _seen(core: Core) -> Box:
    """The part of a core that its window holds: all wanted cells are in it."""
    box, window = core.box, core.window
    assert window is not None
    left, top = max(box.x, window.x), max(box.y, window.y)
    right = min(box.x + box.width, window.x + window.width)
    bottom = min(box.y + box.height, window.y + window.height)
    return Box(left, top, right - left, bottom - top)


def _within(inner: Box, outer: Box) -> tuple[slice, slice]:
    """Rows and columns of a box in an array of another."""
    y, x = inner.y - outer.y, inner.x - outer.x
    return slice(y, y + inner.height), slice(x, x + inner.width)


def _reject(slide: PlannedSlide, core: Core, defect: BadInput) -> str:
    uri = slide.reading.data.uri_of(slide.files.path)
    x = slide.plan.bounds.x + round(core.box.x * slide.plan.downsample)
    y = slide.plan.bounds.y + round(core.box.y * slide.plan.downsample)
    return json.dumps(asdict(Reject.of(defect, uri, slide.files.slide_id, x, y, stage=STAGE)))


def _row(slide: PlannedSlide, number: int, shard: int, core: Core) -> dict[str, Any]:
    return {"slide": number, "shard": shard, "core": _encoded(core), "halo": slide.plan.halo}


def _encoded(core: Core) -> str:
    return json.dumps(asdict(core))


def _decoded(text: str) -> Core:
    tree = json.loads(text)
    return Core(tree["number"], Box(**tree["box"]), None if tree["window"] is None else Box(**tree["window"]))
