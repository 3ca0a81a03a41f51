"""The files of a segmented slide, made of the parts that workers left; `slide.json`, written last, names them."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import shapely
from shapely import affinity

from apacs_ray.config.settings import SegmentSettings
from apacs_ray.data.rejects import Reject
from apacs_ray.inference.joining import join
from apacs_ray.inference.objects import STEPS, CoreObjects, SlideObject, eccentricity
from apacs_ray.inference.parts import MAPS, objects_of, read_parts
from apacs_ray.inference.planning import PICTURE
from apacs_ray.inference.slide_plan import SlidePlan
from apacs_ray.outputs.geojson import GeoJsonWriter
from apacs_ray.outputs.geoparquet import GeoParquetWriter
from apacs_ray.outputs.mask_bands import Band, Change, map_bands, mask_bands
from apacs_ray.outputs.ome_tiff import write_pyramid
from apacs_ray.outputs.overview import Overview
from apacs_ray.outputs.rows import ObjectRow, clean_geometry
from apacs_ray.storage import Store, file_facts
from apacs_ray.training.dataset import decode_pixels

SLIDE_JSON = "slide.json"
MASK, GEOJSON, PARQUET, OVERVIEW = "mask.ome.tif", "cells.geojson.gz", "cells.parquet", "overview.png"

NAMESPACE = uuid.UUID("6f0f5f0a-7c1e-5d0c-9f3e-0d6c3a2b8e11")


@dataclass
class Found:
    """What a slide's segmentation found: objects, px of them, its cores, and a row for each that could not be read."""

    objects: int = 0
    pixels: int = 0
    cores: int = 0
    rejects: list[Reject] = field(default_factory=list)

    @property
    def readable(self) -> float:
        """The share of the cores that could be read."""
        return 1 - len(self.rejects) / self.cores if self.cores else 1.0


def write_slide_files(
    store: Store,
    parts: str,
    plan: SlidePlan,
    settings: SegmentSettings,
    facts: Mapping[str, Any],
) -> Found:
    """Write the files of a slide to the folder of its name; they count when `slide.json` is there.

    Args:
        store: The output.
        parts: Folder of the slide's parts, all of which are there.
        plan: By which it was cut.
        settings: By which it was segmented.
        facts: What else `slide.json` is to say.

    Returns:
        What was found.
    """
    folder = plan.slide_id
    store.delete(f"{folder}/{SLIDE_JSON}")
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        found, changes = _write_objects(store, parts, plan, here, settings)
        overview = Overview(plan.width, plan.height)

        def cores(column: str) -> Iterator[dict[str, Any]]:
            return read_parts(store, parts, plan.shards, ["x", "y", "width", "height", column])

        bands = mask_bands(cores("mask"), plan.width, plan.height, changes)
        _write_image(here / MASK, overview.watch(bands), plan, "mask", 1)
        names = [MASK]
        if settings.maps is not None:
            for name in MAPS:
                names.append(f"{name}.ome.tif")
                bands = map_bands(cores(name), name, settings.maps, plan.width, plan.height)
                _write_image(here / names[-1], bands, plan, name, settings.maps)
        (here / OVERVIEW).write_bytes(overview.draw(decode_pixels(store.read(f"{parts}/{PICTURE}"))))
        files = {name: file_facts(here / name) for name in (*names, GEOJSON, PARQUET, OVERVIEW)}
        for name in files:
            store.upload(f"{folder}/{name}", here / name)
    store.write(f"{folder}/{SLIDE_JSON}", _record(plan, found, {**facts, "origin": settings.origin, "files": files}))
    return found


def _write_image(path: Path, bands: Iterator[Band], plan: SlidePlan, name: str, downsample: int) -> None:
    mpp = plan.output_mpp
    write_pyramid(
        path,
        bands,
        width=-(-plan.width // downsample),
        height=-(-plan.height // downsample),
        mpp=None if mpp is None else mpp * downsample,
        name=f"{plan.slide_id} {name}",
        uuid=str(uuid.uuid5(NAMESPACE, f"{plan.slide_id} {name}")),
        average=name in MAPS,
    )


def object_row(one: SlideObject, plan: SlidePlan, settings: SegmentSettings) -> ObjectRow:
    """Return an object as files hold it: in level-0 px from the bounds of the slide (or its corner)."""
    scale = plan.downsample
    x, y = (plan.bounds.x, plan.bounds.y) if settings.origin == "corner" else (0, 0)
    exact = affinity.affine_transform(one.polygon, [scale, 0, 0, scale, x, y])
    shape = clean_geometry(exact, settings.simplify * scale) or exact
    left, top, right, bottom = exact.bounds
    center = shapely.centroid(exact)
    inside = one.polygon.bounds
    return ObjectRow(
        object_id=str(uuid.uuid5(NAMESPACE, f"{plan.slide_id} {one.first[0]} {one.first[1]}")),
        geometry=shape,
        area_um2=math.nan if plan.output_mpp is None else one.size * plan.output_mpp**2,
        perimeter_um=math.nan if plan.mpp is None else shape.length * plan.mpp,
        centroid_x=round(center.x, 2),
        centroid_y=round(center.y, 2),
        left=left,
        top=top,
        right=right,
        bottom=bottom,
        eccentricity=eccentricity(one.polygon),
        probability=one.probability / one.pixels / STEPS,
        disagreement=one.disagreement / one.pixels / STEPS,
        pixels=one.size,
        touches_border=inside[0] == 0 or inside[1] == 0 or inside[2] == plan.width or inside[3] == plan.height,
    )


def _write_objects(
    store: Store, parts: str, plan: SlidePlan, here: Path, settings: SegmentSettings
) -> tuple[Found, list[Change]]:
    """Write `cells.geojson.gz` and `cells.parquet`; returns also what objects change in the masks of cores."""
    found = Found()
    changes: list[Change] = []
    least, fill = plan.least_px(settings.min_area_um2), plan.least_px(settings.fill_holes_um2)

    def counted() -> Iterator[CoreObjects]:
        columns = ["x", "y", "width", "height", "reject", "pieces", "edges"]
        for row in read_parts(store, parts, plan.shards, columns):
            found.cores += 1
            if row["reject"] is not None:
                found.rejects.append(Reject(**row["reject"]))
            yield objects_of(row)

    with contextlib.ExitStack() as files:
        stream = files.enter_context((here / GEOJSON).open("wb"))
        geojson = files.enter_context(GeoJsonWriter(stream))
        parquet = files.enter_context(GeoParquetWriter(here / PARQUET))
        for one in join(counted(), plan.width, fill):
            if one.size < least:
                changes.append((one.polygon, False))
                continue
            changes += [(hole, True) for hole in one.holes]
            row = object_row(one, plan, settings)
            geojson.write(row)
            parquet.write(row)
            found.objects += 1
            found.pixels += one.size
    return found, changes


def _record(plan: SlidePlan, found: Found, facts: Mapping[str, Any]) -> bytes:
    mpp = plan.output_mpp
    record = {
        "slide_id": plan.slide_id,
        "width": plan.width,
        "height": plan.height,
        "mpp": mpp,
        "level0": {"mpp": plan.mpp, "downsample": plan.downsample, "bounds": asdict(plan.bounds)},
        "engine": plan.engine,
        "notes": list(plan.notes),
        "core": plan.core,
        "halo": plan.halo,
        "cores": found.cores,
        "readable": found.readable,
        "rejects": [asdict(reject) for reject in found.rejects],
        "objects": found.objects,
        "cell_px": found.pixels,
        "cell_um2": None if mpp is None else found.pixels * mpp**2,
        **facts,
    }
    return json.dumps(record, indent=1, sort_keys=True, allow_nan=False).encode()
