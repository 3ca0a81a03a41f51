"""Valid polygons out of shapes as drawn: what crosses itself is made valid, negative regions are cut out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry import GeometryCollection, MultiPolygon, Polygon
from shapely.geometry.base import BaseGeometry

from apacs_ray.errors import BadInput

Ring = npt.NDArray[np.float64]  # (N, 2), closed
MAX_CROSSINGS = 1000  # of an area with itself: the time of a repair grows with their square
MAX_CUTS = 100_000  # pairs of an area and a negative region that meet
EDGE_PAIRS_AT_ONCE = 4_000_000  # pairs of edges that are compared at a time


def areas_of(geometry: BaseGeometry) -> tuple[list[Polygon], str | None]:
    """Return the valid polygons of a geometry, and what is wrong with it, even where it could be repaired.

    Args:
        geometry: what was drawn, px.

    Returns:
        The polygons (none: the geometry cannot be used), and the defect (None: there is none).
    """
    if geometry.is_valid:
        areas = list(polygons_of(geometry))
        return areas, None if areas else "it has no area"
    if _meets_itself_often(geometry):
        return [], f"it crosses itself more than {MAX_CROSSINGS} times"
    reason = shapely.is_valid_reason(geometry)
    try:
        return list(polygons_of(shapely.make_valid(geometry))), reason
    except shapely.errors.GEOSException as error:
        return [], f"it cannot be made valid: {str(error)[:120]}"


def cut_out(areas: Sequence[Polygon], holes: Sequence[Polygon]) -> Iterator[tuple[list[Polygon], str | None]]:
    """Cut the holes out of each area.

    Args:
        areas: valid polygons, px.
        holes: valid polygons, px: negative regions of the same layer.

    Yields:
        For each area what is left of it, and why nothing is if that is a defect.

    Raises:
        BadInput: bad_annotation; the file would take hours.
    """
    around, inside = shapely.STRtree(holes).query(areas, predicate="intersects")
    if len(around) > MAX_CUTS:
        raise BadInput("bad_annotation", f"negative regions cut areas more than {MAX_CUTS} times")
    begins = np.searchsorted(around, np.arange(len(areas) + 1))
    for number, area in enumerate(areas):
        cutting = [holes[hole] for hole in inside[begins[number] : begins[number + 1]]]
        if not cutting:
            yield [area], None
        elif _meets_itself_often(GeometryCollection([area, *cutting])):
            yield [], f"negative regions cross it more than {MAX_CROSSINGS} times"
        else:
            try:
                yield list(polygons_of(shapely.difference(area, shapely.union_all(cutting)))), None
            except shapely.errors.GEOSException as error:
                yield [], f"its negative regions cannot be cut out: {str(error)[:120]}"


def rings_of(area: Polygon) -> Iterator[Ring]:
    """Yield the rings of a polygon, its outline first: (N, 2) float64, closed, px."""
    yield np.asarray(area.exterior.coords)[:, :2]
    for hole in area.interiors:
        yield np.asarray(hole.coords)[:, :2]


def polygons_of(geometry: BaseGeometry) -> Iterator[Polygon]:
    """Yield the polygons in a geometry of any kind that have an area."""
    if isinstance(geometry, Polygon):
        if geometry.area > 0:
            yield geometry
    elif isinstance(geometry, MultiPolygon | GeometryCollection):
        for part in geometry.geoms:
            yield from polygons_of(part)


def _all_rings(geometry: BaseGeometry) -> Iterator[Ring]:
    """Yield the rings of areas of any kind, also of such that have no size."""
    if isinstance(geometry, Polygon):
        yield from rings_of(geometry)
    for part in getattr(geometry, "geoms", ()):
        yield from _all_rings(part)


def _meets_itself_often(geometry: BaseGeometry) -> bool:
    """Tell whether more than `MAX_CROSSINGS` pairs of edges meet that are no neighbors; looks no further than that."""
    rings = list(_all_rings(geometry))
    if not rings:
        return False
    starts, ends = (np.concatenate([ring[part] for ring in rings]) for part in (slice(-1), slice(1, None)))
    edges = shapely.linestrings(np.stack([starts, ends], axis=1)[(starts != ends).any(axis=1)])
    tree, meetings = shapely.STRtree(edges), 0
    for start in range(0, len(edges), step := max(1, EDGE_PAIRS_AT_ONCE // max(1, len(edges)))):
        part = edges[start : start + step]
        # an edge meets itself and its two neighbors
        meetings += tree.query(part, predicate="intersects").shape[1] - 3 * len(part)
        if meetings > 2 * MAX_CROSSINGS:  # each pair is counted twice
            return True
    return False
