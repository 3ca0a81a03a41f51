"""Making the plan of a slide: it is opened, its tissue found, and regions that restrict it are read."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from apacs_ray.data.grid import Box
from apacs_ray.data.images import Rgb
from apacs_ray.errors import BadInput
from apacs_ray.inference.cores import Lattice
from apacs_ray.inference.slide_plan import SlidePlan, area_cells, finished_plan, lattice_size, tissue_cells, write_plan
from apacs_ray.slides.annotations.read import read_annotations
from apacs_ray.slides.manifest import SlideTask, downsample_to, mpp_of, opened_slide
from apacs_ray.slides.reader import Slide, SlideInfo
from apacs_ray.slides.slide_files import SlideFiles
from apacs_ray.slides.slide_grid import grid_size
from apacs_ray.slides.slide_window import read_window
from apacs_ray.slides.tissue import Tissue, find_tissue
from apacs_ray.storage import Store

PICTURE = "picture.png"  # the scanned part of the slide
PICTURE_SIDE = 1600  # px, its longer side; longer where tissue was looked for on a larger picture
AT_ONCE = 1 << 26  # px of a level that are read for it
MPP_NOTE = 0.1  # share by which a slide's mpp may differ from the training's before a person is told


@dataclass(frozen=True)
class Cutting:
    """How slides are cut: the um per px of the networks (None: each slide's own), and sizes in px."""

    mpp: float | None
    core: int
    halo: int
    shard: int
    tissue: bool


@dataclass(frozen=True)
class Region:
    """A GeoJSON that restricts a slide: where it lies, its path there, and its version (None: it is not there)."""

    store: Store
    path: str
    version: str | None


def make_plan(reading: SlideTask, files: SlideFiles, region: Region | None, cutting: Cutting, parts: str) -> SlidePlan:
    """Plan a slide, and leave the plan, its cells and the slide's picture in the folder `parts` of the output.

    Args:
        reading: Where slides lie, how they are opened, and the output.
        files: The slide.
        region: What restricts it.
        cutting: How slides are cut.
        parts: Folder of its parts.

    Returns:
        The plan.

    Raises:
        BadInput: The slide, or the region, cannot be read.
    """
    with opened_slide(reading, files) as slide:
        plan, tissue = _planned(reading, files, slide, cutting)
        cells = np.ones(lattice_size(plan.width, plan.height), bool)
        if cutting.tissue:
            cells &= tissue_cells(tissue, plan)
        if region is not None:
            cells &= _region_cells(region, slide.info, plan)
        picture = _picture(slide, tissue)
    plan = finished_plan(plan, cells)
    sink = io.BytesIO()
    Image.fromarray(picture).save(sink, "png")
    reading.output.write(f"{parts}/{PICTURE}", sink.getvalue())
    write_plan(reading.output, parts, plan, cells)
    return plan


def _planned(reading: SlideTask, files: SlideFiles, slide: Slide, cutting: Cutting) -> tuple[SlidePlan, Tissue]:
    info = slide.info
    mpp = mpp_of(reading.mpps, reading.settings, files, info)
    notes = list(info.notes)
    downsample = downsample_to(cutting.mpp, mpp)
    if mpp is None:
        wanted = "" if cutting.mpp is None else f", though the networks expect {cutting.mpp:g}"
        notes.append(
            f"um per px not known: segmented as it is{wanted}, and areas in um2 "
            "do not apply (data.mpps or data.mpp tells them)"
        )
    elif downsample < 1 - MPP_NOTE:
        notes.append(f"{mpp:g} um per px, coarser than the {cutting.mpp:g} of the training: it is enlarged")
    width, height = grid_size(info.bounds, downsample)
    plan = SlidePlan(
        files.slide_id,
        info.engine,
        width,
        height,
        downsample,
        mpp,
        info.bounds,
        cutting.core,
        cutting.halo,
        cutting.shard,
        notes=tuple(notes),
    )
    return plan, find_tissue(slide, mpp)


def _region_cells(region: Region, info: SlideInfo, plan: SlidePlan) -> Lattice:
    name = region.path.rpartition("/")[2]
    try:
        content = region.store.read_small(region.path)
    except FileNotFoundError as error:
        raise BadInput("bad_annotation", f"{name}: the region of interest is gone") from error
    drawn = read_annotations(content, name).placed(info)
    if not drawn.areas:
        raise BadInput("bad_annotation", f"{name}: no area restricts the slide; draw one, or take the file away")
    return area_cells(drawn.areas, plan)


def _picture(slide: Slide, tissue: Tissue) -> Rgb:
    """The scanned part of a slide, `PICTURE_SIDE` px long where that is read at once, else as tissue was looked for."""
    bounds = slide.info.bounds
    longest = max(bounds.width, bounds.height)
    downsample = max(1.0, longest / PICTURE_SIDE)
    level = slide.info.levels[slide.info.level_for(downsample)]
    if longest / tissue.downsample < PICTURE_SIDE and bounds.width * bounds.height < AT_ONCE * level.downsample**2:
        width, height = grid_size(bounds, downsample)
        with contextlib.suppress(BadInput):  # damaged there: its core will say so
            return read_window(slide, Box(0, 0, width, height), downsample)
    scale = tissue.downsample
    top, left = int(bounds.y / scale), int(bounds.x / scale)
    bottom = max(int((bounds.y + bounds.height) / scale), top + 1)
    right = max(int((bounds.x + bounds.width) / scale), left + 1)
    return tissue.picture[top:bottom, left:right]
