"""A few slides opened, and a few of their cores segmented, to know what the rest will come to. No Ray, nothing is kept.

The networks see parts of windows that they can do in seconds; the files are those of a small slide that such parts make
up, and of an empty one, which tells what glass costs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO

import numpy as np
from PIL import Image

from apacs_ray.config.settings import SegmentSettings
from apacs_ray.data.grid import Box
from apacs_ray.data.images import Rgb
from apacs_ray.data.units import one_unit
from apacs_ray.errors import BadInput
from apacs_ray.estimate.cutting import spread
from apacs_ray.estimate.networks import ASSUMED_GPU, affordable_part, fastest, flops
from apacs_ray.estimate.segmenting import UnitCosts, Workload
from apacs_ray.inference.cores import ALIGN
from apacs_ray.inference.model_files import ModelFiles
from apacs_ray.inference.parts import FinishedCore, part_path, write_part
from apacs_ray.inference.planning import PICTURE, Cutting, Region, make_plan
from apacs_ray.inference.predictor import Predictor
from apacs_ray.inference.segment_steps import finished_core
from apacs_ray.inference.segmenter import TTA_VIEWS, Segmented, Segmenter
from apacs_ray.inference.slide_plan import SlidePlan, finished_plan, lattice_size, read_cells, write_plan
from apacs_ray.outputs.slide_files import write_slide_files
from apacs_ray.slides.manifest import SlideTask, opened_slide
from apacs_ray.slides.slide_files import SlideFiles
from apacs_ray.slides.slide_window import read_window
from apacs_ray.storage import LocalStore, Store
from apacs_ray.training.device import default_device

WINDOWS = 3  # that are read, at most
WARM = 256  # px
EMPTY = 2048, 8192  # px, sides of two empty slides, whose difference is what glass costs
DRIVER = 0.011  # s a shard; `benchmarks/capacity.py` measures it


@dataclass(frozen=True)
class SlideToSample:
    """A slide: how it is read, its files, and what restricts it."""

    reading: SlideTask
    files: SlideFiles
    region: Region | None


@dataclass(frozen=True)
class LookedAt:
    """A slide that was opened: its plan, or why there is none; px of the lattice's cells that are segmented."""

    slide_id: str
    plan: SlidePlan | None
    reason: str = ""
    wanted_pixels: int = 0
    work: Workload | None = None


@dataclass(frozen=True)
class SegmentSample:
    """What a sample told: the slides, and the costs; None where no core could be read."""

    slides: tuple[LookedAt, ...]
    costs: UnitCosts | None


def sample_slides(
    slides: Sequence[SlideToSample],
    cutting: Cutting,
    model: Store,
    models: ModelFiles,
    settings: SegmentSettings,
    *,
    assumed: bool,
) -> SegmentSample:
    """Open slides, and segment parts of a few of their cores.

    Args:
        slides: To open.
        cutting: How slides are cut.
        model: Where the networks are.
        models: What they are.
        settings: Of the segmentation.
        assumed: A GPU is not there yet: what the networks take on it follows from their FLOPs.

    Returns:
        What each slide is, and the costs.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = LocalStore(folder)
        began = time.perf_counter()
        looked = [_look_at(replace(one.reading, output=output), one, cutting) for one in slides]
        planning = (time.perf_counter() - began) / max(1, len(slides))
        windows, read = _read_windows(output, slides, looked)
        if not windows:
            return SegmentSample(tuple(looked), None)
        found, networks = _through_networks(windows, model, models, settings, assumed=assumed)
        mpp = next(one.plan.output_mpp for one in looked if one.plan is not None)
        costs = replace(costs_of(found, settings, mpp), plan=planning, read=read, networks=networks)
    return SegmentSample(tuple(looked), costs)


def window_flops(models: ModelFiles, size: tuple[int, int], *, tta: bool) -> dict[str, int]:
    """Return the floating-point operations of each network on a window of (height, width)."""
    views = TTA_VIEWS if tta else 1
    of_fusion = max(spec.views for spec in models.specs.values())  # of each view its members are run
    return {
        name: views * (of_fusion if spec.kind == "member" else 1) * flops([spec], size)
        for name, spec in models.specs.items()
    }


def _look_at(reading: SlideTask, slide: SlideToSample, cutting: Cutting) -> LookedAt:
    name = slide.files.slide_id
    try:
        with one_unit(slide.files.path):
            plan = make_plan(reading, slide.files, slide.region, cutting, name)
    except BadInput as defect:
        return LookedAt(name, None, defect.reason)
    cells = read_cells(reading.output, name, plan)
    pixels = plan.width * plan.height
    work = Workload.of_slide(plan.all_cores(cells), pixels=pixels, size=slide.files.size, shards=plan.shards)
    return LookedAt(name, plan, "", min(int(cells.sum()) * ALIGN**2, pixels), work)


def _read_windows(
    output: LocalStore, slides: Sequence[SlideToSample], looked: Sequence[LookedAt]
) -> tuple[list[Rgb], float]:
    """Read windows from all over the slides; return them, and seconds a px. One that is damaged is passed over."""
    places = []
    for slide, one in zip(slides, looked, strict=True):
        if one.plan is not None and one.plan.cores:
            cells = read_cells(output, one.slide_id, one.plan)
            wanted = [core.window for core in one.plan.all_cores(cells) if core.window is not None]
            places += [(slide, one.plan, window) for window in wanted]
    windows, seconds = [], 0.0
    for slide, plan, window in spread(places, WINDOWS):
        try:
            with one_unit(slide.files.path), opened_slide(slide.reading, slide.files) as reader:
                began = time.perf_counter()
                windows.append(read_window(reader, window, plan.downsample))
                seconds += time.perf_counter() - began
        except BadInput:  # of segmentation, too, it is a region's reject
            continue
    return windows, seconds / max(1, sum(window.shape[0] * window.shape[1] for window in windows))


def _through_networks(
    windows: Sequence[Rgb], model: Store, models: ModelFiles, settings: SegmentSettings, *, assumed: bool
) -> tuple[list[Segmented], float]:
    """Segment the middles of windows, squares of one size; return what was found, and seconds a px of a window."""
    specs, views = list(models.specs.values()), TTA_VIEWS if settings.tta else 1
    smallest = min(window.shape[0] for window in windows), min(window.shape[1] for window in windows)
    side = max(ALIGN, min(affordable_part(specs, smallest, views, default_device())) // ALIGN * ALIGN)
    predictor = Predictor.load(model, models.folders, threads=settings.threads, precision=settings.precision)
    segmenter = Segmenter(predictor, settings.use, threshold=settings.threshold, tta=settings.tta)
    parts = []
    for window in windows:
        top, left = (window.shape[0] - side) // 2, (window.shape[1] - side) // 2
        parts.append(np.ascontiguousarray(window[max(top, 0) :, max(left, 0) :][:side, :side]))
    on_assumed = sum(window_flops(models, (side, side), tta=settings.tta).values()) / ASSUMED_GPU
    seconds = on_assumed if assumed else fastest(partial(segmenter, parts[0]))
    return [segmenter(part) for part in parts], seconds / side**2


def costs_of(found: Sequence[Segmented], settings: SegmentSettings, mpp: float | None) -> UnitCosts:
    """Measure objects and files: of a slide that masks make up, side by side, and of empty slides.

    Args:
        found: What was segmented, squares of one size.
        settings: Of the segmentation.
        mpp: um per px of it.

    Returns:
        Costs in which plan, read and networks are 0.
    """
    side = len(found[0].mask)
    scale = SlidePlan("sample", "", 0, 0, 1.0, mpp, Box(0, 0, 1, 1), 1, 0, 1)

    def finished(number: int, one: Segmented) -> FinishedCore:
        box = Box(number * side, 0, *one.mask.shape[::-1])
        values = {"probability": one.probability, "disagreement": one.disagreement}
        return finished_core(number, box, one.mask, values, scale, settings)

    # what a first call imports is not its speed
    first = found[0]
    part = slice(0, WARM), slice(0, WARM)
    corner = Segmented(first.mask[part], first.probability[part], first.disagreement[part])
    _write_slide(replace(scale, width=len(corner.mask), height=len(corner.mask)), [finished(0, corner)], settings)
    began = time.process_time()
    cores = [finished(number, one) for number, one in enumerate(found)]
    seconds = time.process_time() - began
    pixels = len(cores) * side**2
    filled = _write_slide(replace(scale, width=len(cores) * side, height=side), cores, settings)
    small, large = (_write_slide(replace(scale, width=glass, height=glass), [], settings) for glass in EMPTY)
    area = EMPTY[1] ** 2 - EMPTY[0] ** 2
    glass = max(0.0, (large.files - small.files) / area)
    glass_bytes = max(0.0, (large.size - small.size) / area)
    return UnitCosts(
        plan=0.0,
        read=0.0,
        networks=0.0,
        objects=(seconds + filled.part) / pixels,
        files=max(0.0, (filled.files - small.files) / pixels - glass),
        glass=glass,
        driver=DRIVER,
        part_bytes=filled.part_size / pixels,
        file_bytes=max(0.0, (filled.size - small.size) / pixels - glass_bytes),
        glass_bytes=glass_bytes,
    )


@dataclass(frozen=True)
class _Written:
    """Core-seconds of a part and of a slide's files, and the bytes of both."""

    part: float
    files: float
    part_size: int
    size: int


def _write_slide(plan: SlidePlan, cores: Sequence[FinishedCore], settings: SegmentSettings) -> _Written:
    """Write a slide of one row of cores."""
    side = cores[0].box.width if cores else max(plan.width, plan.height)
    plan = replace(plan, bounds=Box(0, 0, plan.width, plan.height), core=side, shard=max(1, len(cores)))
    cells = np.full(lattice_size(plan.width, plan.height), bool(cores))
    plan = finished_plan(plan, cells)
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        began = time.process_time()
        if cores:
            write_part(store, part_path("parts", 0), cores)
        part, size = time.process_time() - began, sum(entry.size for entry in store.list())
        sink = BytesIO()
        Image.new("RGB", (64, 64), "white").save(sink, "png")
        store.write(f"parts/{PICTURE}", sink.getvalue())
        write_plan(store, "parts", plan, cells)
        began = time.process_time()
        write_slide_files(store, "parts", plan, settings, {})
        files = time.process_time() - began
        written = sum(entry.size for entry in store.list(plan.slide_id))
    return _Written(part, files, size, written)
