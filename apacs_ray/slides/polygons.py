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
from xml.etree.ElementTree import Element

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
LARGEST_FILE = 512 << 20  # bytes
# Brackets and commas of a GeoJSON, or tags and attributes of an XML, each an object of up to 150 bytes in memory; a
# vertex takes three or four of them
MOST_PARTS = 30_000_000
MOST_CROSSINGS = 1000  # of an area with itself; to repair it takes time by their square
MOST_DEFECTS = 1000  # that are told one by one
AT_ONCE = 4_000_000  # crossings of rows and edges that are counted at a time


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
    _require_bounded(content, b"[{,")
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput("bad_annotation", f"no JSON: {error}") from error
    features = tree.get("features", [tree]) if isinstance(tree, dict) else tree
    if not isinstance(features, list):
        raise BadInput("bad_annotation", "no GeoJSON: neither a FeatureCollection nor a list of features")
    return _checked(_shapes(features, classes))


def _require_bounded(content: bytes, marks: bytes) -> None:
    """Raise BadInput for a file that would take far more memory than it has bytes, before it is parsed."""
    if len(content) > LARGEST_FILE:
        raise BadInput("bad_annotation", f"{len(content)} bytes; {LARGEST_FILE} are the limit")
    parts = sum(content.count(mark) for mark in marks)
    if parts > MOST_PARTS:
        raise BadInput(
            "bad_annotation", f"{parts} parts, about {parts // 3} vertices; {MOST_PARTS} parts are the limit"
        )


def _shapes(features: list[Any], classes: Sequence[str]) -> Iterator[tuple[int, BaseGeometry | Defect]]:
    for number, feature in enumerate(features):
        geometry = feature.get("geometry", feature) if isinstance(feature, dict) else None
        if classes and _class_of(feature) not in classes:
            continue
        try:
            yield number, shape(geometry)  # type: ignore[arg-type]
        except Exception as error:  # shapely raises whatever its parts raise  # noqa: BLE001
            yield number, Defect(number, f"not a geometry: {str(error)[:120]}")


def _class_of(feature: Any) -> str | None:
    properties = feature.get("properties") if isinstance(feature, dict) else None
    named = (properties or {}).get("classification") if isinstance(properties, dict) else None
    return named.get("name") if isinstance(named, dict) else None


def read_asap(content: bytes, classes: Sequence[str] = ()) -> Annotations:
    """ASAP's XML: annotations of type Polygon, Spline or Rectangle; `classes` keeps these groups only.

    Raises BadInput: bad_annotation (no XML, or one that would expand entities).
    """
    _require_bounded(content, b"<=")
    try:
        root = fromstring(content, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:
        raise BadInput("bad_annotation", f"no plain XML: {error}") from error
    return _checked(_drawn(root, classes))


def _drawn(root: Element, classes: Sequence[str]) -> Iterator[tuple[int, BaseGeometry | Defect]]:
    for number, annotation in enumerate(root.iter("Annotation")):
        if classes and annotation.get("PartOfGroup") not in classes:
            continue
        if annotation.get("Type") not in ("Polygon", "Spline", "Rectangle"):
            yield number, Defect(number, f"type {annotation.get('Type')} has no area")
            continue
        try:
            points = [
                (int(point.get("Order", place)), float(point.attrib["X"]), float(point.attrib["Y"]))
                for place, point in enumerate(annotation.iter("Coordinate"))
            ]
            yield number, Polygon([(x, y) for _, x, y in sorted(points)])
        except (KeyError, ValueError) as error:
            yield number, Defect(number, f"not a polygon: {str(error)[:120]}")


def _checked(found: Iterable[tuple[int, BaseGeometry | Defect]]) -> Annotations:
    areas: list[Polygon] = []
    defects: list[Defect] = []
    repaired = untold = 0
    for number, geometry in found:
        reason = None if isinstance(geometry, Defect) else _unusable(geometry)
        if isinstance(geometry, Defect) or reason is not None:
            defect = geometry if isinstance(geometry, Defect) else Defect(number, reason or "")
            parts = []
        else:
            defect = Defect(number, f"{geometry.geom_type} has no area")
            if not geometry.is_valid:
                defect = Defect(number, shapely.is_valid_reason(geometry))
                geometry = shapely.make_valid(geometry)
                repaired += 1
            parts = list(_polygons(geometry))
        areas += parts
        if not parts and len(defects) < MOST_DEFECTS:
            defects.append(defect)
        elif not parts:
            untold += 1
    if untold:
        defects.append(Defect(defects[-1].feature, f"and {untold} more after this one have no area either"))
    return Annotations(tuple(areas), tuple(defects), repaired)


def _unusable(geometry: BaseGeometry) -> str | None:
    """Why a geometry can be neither used nor repaired."""
    if not np.isfinite(shapely.get_coordinates(geometry)).all():
        return "a coordinate is not finite"
    if not geometry.is_valid and _crosses_itself_often(geometry):
        return f"it crosses itself more than {MOST_CROSSINGS} times"
    return None


def _crosses_itself_often(geometry: BaseGeometry) -> bool:
    """Whether more than `MOST_CROSSINGS` pairs of edges meet that are no neighbours; looks no further than that."""
    rings = list(_all_rings(geometry))
    if not rings:
        return False
    starts, ends = (np.concatenate([ring[part] for ring in rings]) for part in (slice(-1), slice(1, None)))
    edges = shapely.linestrings(np.stack([starts, ends], axis=1)[(starts != ends).any(axis=1)])
    tree, meetings = shapely.STRtree(edges), 0
    for start in range(0, len(edges), step := max(1, AT_ONCE // max(1, len(edges)))):
        part = edges[start : start + step]
        meetings += tree.query(part, predicate="intersects").shape[1] - 3 * len(part)  # itself and its neighbours
        if meetings > 2 * MOST_CROSSINGS:  # each pair is met twice
            return True
    return False


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


def _all_rings(geometry: BaseGeometry) -> Iterator[Ring]:
    """Of areas of any kind, also of such that have no size."""
    if isinstance(geometry, Polygon):
        yield from _rings(geometry)
    for part in getattr(geometry, "geoms", ()):
        yield from _all_rings(part)


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
    # where a row crosses an edge, inside and outside change places; `AT_ONCE` of these places at a time
    ends_at = np.cumsum(last - first)
    if not len(ends_at) or not ends_at[-1]:
        return
    top, foot = int(first.min()), int(last.max())
    bounds = np.array([min(starts[:, 0].min(), ends[:, 0].min()), max(starts[:, 0].max(), ends[:, 0].max())])
    sides = np.ceil((bounds - x) / downsample - 0.5) + np.array([-1, 1])  # a crossing may be rounded to one further
    left, right = (int(column) for column in np.clip(sides, 0, width))
    shape_ = (foot - top, right - left + 1)
    toggles = np.zeros(shape_[0] * shape_[1], np.int64)
    begin = 0
    while begin < len(ends_at):
        done = ends_at[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends_at, done + AT_ONCE, side="right")))
        part = slice(begin, end)
        rows_each = (last - first)[part]
        edges = begin + np.repeat(np.arange(end - begin), rows_each)
        rows = np.arange(len(edges)) - np.repeat(np.cumsum(rows_each) - rows_each, rows_each) + first[edges]
        centre = y + (rows + 0.5) * downsample
        share = (centre - upper[edges, 1]) / (lower[edges, 1] - upper[edges, 1])
        crossing = upper[edges, 0] + share * (lower[edges, 0] - upper[edges, 0])
        columns = np.clip(np.ceil((crossing - x) / downsample - 0.5), left, right).astype(np.int64)
        toggles += np.bincount((rows - top) * shape_[1] + columns - left, minlength=len(toggles))
        begin = end
    inside = (np.cumsum(toggles.reshape(shape_), axis=1) % 2).astype(bool)[:, :-1]
    mask[top:foot, left:right] |= inside
