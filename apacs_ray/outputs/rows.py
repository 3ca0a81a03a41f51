"""One segmented object as files hold it, and the one rule by which its outline is made fit for them.

QuPath refuses a whole file for one invalid polygon, and rounding can make a valid one invalid: what is written here has
been simplified, then rounded, then made valid on the grid of the rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import shapely
from shapely.geometry import MultiPolygon, Polygon
from shapely.geometry.base import BaseGeometry

from apacs_ray.slides.annotations.areas import polygons_of


@dataclass(frozen=True)
class ObjectRow:
    """One segmented object.

    Coordinates are px of the full resolution, counted from the slide's bounds, as QuPath does.

    Attributes:
        object_id: a UUID.
        geometry: Polygon or MultiPolygon, px, as `clean_geometry` returns it.
        area_um2: um^2, NaN where the slide's mpp is unknown.
        perimeter_um: um, NaN where the slide's mpp is unknown.
        centroid_x: px.
        centroid_y: px.
        left: px, of the bounding box, as are the next three.
        top: px.
        right: px.
        bottom: px.
        eccentricity: of the ellipse with the same second moments, 0..1.
        probability: mean over its pixels, 0..1.
        disagreement: mean standard deviation of the members' probabilities, 0..0.5.
        pixels: how many it has in the mask.
        touches_border: whether it reaches the edge of what was segmented, so that part of it may be missing.
    """

    object_id: str
    geometry: BaseGeometry
    area_um2: float
    perimeter_um: float
    centroid_x: float
    centroid_y: float
    left: float
    top: float
    right: float
    bottom: float
    eccentricity: float
    probability: float
    disagreement: float
    pixels: int
    touches_border: bool


def clean_geometry(geometry: BaseGeometry, tolerance_px: float, decimals: int = 2) -> BaseGeometry | None:
    """Simplify an outline, round it, and keep of it what has an area.

    Args:
        geometry: of any kind, also invalid; px.
        tolerance_px: how far the outline may move (Douglas-Peucker, which keeps holes inside and parts apart); twice
            as far beside the point where a ring starts, which GEOS drops after the others.
        decimals: of the coordinates.

    Returns:
        A valid Polygon, or MultiPolygon of several parts, whose coordinates lie on the grid of the rounding; None when
        no area is left.
    """
    simple = shapely.simplify(_valid_areas(geometry), tolerance_px, preserve_topology=True)
    # simplified, a part may cross another. Of what is valid this makes what is valid on the grid: edges that would
    # cross after rounding meet at a point of it
    rounded = shapely.set_precision(_valid_areas(simple), 10.0**-decimals, mode="valid_output")
    parts = list(polygons_of(rounded))
    if not parts:
        return None
    return parts[0] if len(parts) == 1 else MultiPolygon(parts)


def _valid_areas(geometry: BaseGeometry) -> BaseGeometry:
    valid = geometry if geometry.is_valid else shapely.make_valid(geometry)
    return valid if isinstance(valid, Polygon | MultiPolygon) else MultiPolygon(list(polygons_of(valid)))
