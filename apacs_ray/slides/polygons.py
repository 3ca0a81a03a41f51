"""Polygons drawn by people: read from QuPath's GeoJSON and ASAP's XML, checked, and rasterised.

A pixel belongs to a polygon when its centre lies inside: pixel (c, r) of a tile that begins at level-0 (x, y) with
`downsample` d has its centre at (x + (c + 0.5) d, y + (r + 0.5) d). A centre exactly on an edge belongs to the polygon
on its right or below, so tiles put together equal the whole, and polygons that share an edge share no pixel.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from defusedxml import DefusedXmlException
from defusedxml.ElementTree import ParseError, fromstring
from shapely.geometry import GeometryCollection, MultiPolygon, Polygon, shape
from shapely.geometry.base import BaseGeometry

from apacs_ray.errors import BadInput

Mask = npt.NDArray[np.bool_]
Ring = npt.NDArray[np.float64]  # (N, 2), closed
LARGEST_FILE = 1 << 30  # bytes


@dataclass(frozen=True)
class Defect:
    """An annotation that is no area: its index in the file, and why."""

    feature: int
    reason: str


@dataclass(frozen=True)
class Annotations:
    """The areas of one slide, level-0 px. `repaired` counts those that crossed themselves and were made valid."""

    areas: tuple[Polygon, ...]
    defects: tuple[Defect, ...] = ()
    repaired: int = 0

    def moved(self, dx: float, dy: float) -> Annotations:
        """The same areas, shifted by (dx, dy) px."""
        if not dx and not dy:
            return self
        moved = shapely.transform(list(self.areas), lambda points: points + np.array([dx, dy]))
        return Annotations(tuple(moved), self.defects, self.repaired)


def read_geojson(content: bytes, classes: Sequence[str] = ()) -> Annotations:
    """QuPath's GeoJSON: a FeatureCollection, a list of features, one feature or one geometry; polygons only.

    `classes` keeps features of these class names only (empty: all). Raises BadInput: bad_annotation.
    """
    if len(content) > LARGEST_FILE:
        raise BadInput("bad_annotation", f"GeoJSON of {len(content)} bytes; {LARGEST_FILE} is the limit")
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput("bad_annotation", f"no JSON: {error}") from error
    features = tree.get("features", [tree]) if isinstance(tree, dict) else tree
    if not isinstance(features, list):
        raise BadInput("bad_annotation", "no GeoJSON: neither a FeatureCollection nor a list of features")
    found: list[tuple[int, BaseGeometry | Defect]] = []
    for number, feature in enumerate(features):
        geometry = feature.get("geometry", feature) if isinstance(feature, dict) else None
        if classes and _class_of(feature) not in classes:
            continue
        try:
            found.append((number, shape(geometry)))  # type: ignore[arg-type]
        except Exception as error:  # shapely raises whatever its parts raise  # noqa: BLE001
            found.append((number, Defect(number, f"not a geometry: {str(error)[:120]}")))
    return _checked(found)


def _class_of(feature: Any) -> str | None:
    properties = feature.get("properties") if isinstance(feature, dict) else None
    named = (properties or {}).get("classification") if isinstance(properties, dict) else None
    return named.get("name") if isinstance(named, dict) else None


def read_asap(content: bytes, classes: Sequence[str] = ()) -> Annotations:
    """ASAP's XML: annotations of type Polygon, Spline or Rectangle; `classes` keeps these groups only.

    Raises BadInput: bad_annotation (no XML, or one that would expand entities).
    """
    try:
        root = fromstring(content, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError) as error:
        raise BadInput("bad_annotation", f"no plain XML: {error}") from error
    found: list[tuple[int, BaseGeometry | Defect]] = []
    for number, annotation in enumerate(root.iter("Annotation")):
        if classes and annotation.get("PartOfGroup") not in classes:
            continue
        if annotation.get("Type") not in ("Polygon", "Spline", "Rectangle"):
            found.append((number, Defect(number, f"type {annotation.get('Type')} has no area")))
            continue
        try:
            points = [
                (int(point.get("Order", place)), float(point.attrib["X"]), float(point.attrib["Y"]))
                for place, point in enumerate(annotation.iter("Coordinate"))
            ]
            found.append((number, Polygon([(x, y) for _, x, y in sorted(points)])))
        except (KeyError, ValueError) as error:
            found.append((number, Defect(number, f"not a polygon: {str(error)[:120]}")))
    return _checked(found)


def _checked(found: Iterable[tuple[int, BaseGeometry | Defect]]) -> Annotations:
    areas: list[Polygon] = []
    defects: list[Defect] = []
    repaired = 0
    for number, geometry in found:
        if isinstance(geometry, Defect):
            defects.append(geometry)
            continue
        if not np.isfinite(shapely.get_coordinates(geometry)).all():
            defects.append(Defect(number, "a coordinate is not finite"))
            continue
        if not geometry.is_valid:
            reason = shapely.is_valid_reason(geometry)
            geometry = shapely.make_valid(geometry)
            repaired += 1
        else:
            reason = f"{geometry.geom_type} has no area"
        parts = list(_polygons(geometry))
        if parts:
            areas += parts
        else:
            defects.append(Defect(number, reason))
    return Annotations(tuple(areas), tuple(defects), repaired)


def _polygons(geometry: BaseGeometry) -> Iterator[Polygon]:
    if isinstance(geometry, Polygon):
        if geometry.area > 0:
            yield geometry
    elif isinstance(geometry, MultiPolygon | GeometryCollection):
        for part in geometry.geoms:
            yield from _polygons(part)


class PolygonMask:
    """The union of a slide's areas, tile by tile; an index finds the areas that a tile touches."""

    def __init__(self, annotations: Annotations) -> None:
        self._areas = annotations.areas
        self._tree = shapely.STRtree(annotations.areas)

    def tile(self, x: float, y: float, width: int, height: int, downsample: float) -> Mask:
        """(height, width) bool of the tile that begins at level-0 (x, y)."""
        mask = np.zeros((height, width), bool)
        window = shapely.box(x, y, x + width * downsample, y + height * downsample)
        for number in self._tree.query(window):
            rings = list(_rings(self._areas[number]))
            fill(mask, rings, x, y, downsample)
        return mask


def _rings(area: Polygon) -> Iterator[Ring]:
    yield np.asarray(area.exterior.coords)[:, :2]
    for hole in area.interiors:
        yield np.asarray(hole.coords)[:, :2]


def fill(mask: Mask, rings: Sequence[Ring], x: float, y: float, downsample: float) -> None:
    """Set the pixels of `mask` (H, W) whose centres lie inside the rings by the even-odd rule."""
    height, width = mask.shape
    starts = np.concatenate([ring[:-1] for ring in rings])
    ends = np.concatenate([ring[1:] for ring in rings])
    upper = np.where((starts[:, 1] <= ends[:, 1])[:, None], starts, ends)
    lower = np.where((starts[:, 1] <= ends[:, 1])[:, None], ends, starts)
    # rows whose centre lies in [upper, lower): the first at or below an end
    first = np.clip(np.ceil((upper[:, 1] - y) / downsample - 0.5), 0, height).astype(np.int64)
    last = np.clip(np.ceil((lower[:, 1] - y) / downsample - 0.5), 0, height).astype(np.int64)
    rows_each = last - first
    edges = np.repeat(np.arange(len(first)), rows_each)
    if not len(edges):
        return
    rows = np.arange(len(edges)) - np.repeat(np.cumsum(rows_each) - rows_each, rows_each) + first[edges]
    centre = y + (rows + 0.5) * downsample
    share = (centre - upper[edges, 1]) / (lower[edges, 1] - upper[edges, 1])
    crossing = upper[edges, 0] + share * (lower[edges, 0] - upper[edges, 0])
    columns = np.clip(np.ceil((crossing - x) / downsample - 0.5), 0, width).astype(np.int64)
    top, left = rows.min(), columns.min()
    shape_ = (int(rows.max() - top) + 1, int(columns.max() - left) + 1)
    toggles = np.bincount((rows - top) * shape_[1] + columns - left, minlength=shape_[0] * shape_[1]).reshape(shape_)
    inside = (np.cumsum(toggles, axis=1) % 2).astype(bool)[:, :-1]
    mask[top : top + inside.shape[0], left : left + inside.shape[1]] |= inside
