"""Holes in objects: what an object encloses and is not, with all that lies in it."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import shapely
from shapely.geometry import MultiPolygon, Polygon

from apacs_ray.data.images import Mask
from apacs_ray.inference.objects import CoreObjects, Piece, SlideObject, paint
from apacs_ray.inference.outlines import joined

AnyObject = TypeVar("AnyObject", Piece, SlideObject)


def holes_of(polygon: Polygon | MultiPolygon, least: float) -> list[Polygon]:
    """Return the holes of an object that are smaller than `least` px, other objects in them included.

    Args:
        polygon: Along the edges of pixels.
        least: px.

    Returns:
        The holes, along the edges of pixels. Pixels that meet at corners only do enclose: they are one object.
    """
    if isinstance(polygon, Polygon):
        found = [Polygon(ring) for ring in polygon.interiors]
    else:
        lines = shapely.union_all([part.boundary for part in polygon.geoms])  # cut where parts meet
        faces = shapely.polygonize(list(shapely.get_parts(lines))).geoms
        shapely.prepare(polygon)
        found = [
            face
            for face in faces
            if isinstance(face, Polygon) and not shapely.contains(polygon, face.representative_point())
        ]
    return [hole for hole in found if hole.area < least]


def filled(one: AnyObject, holes: list[Polygon]) -> AnyObject:
    """Return an object with some of its `holes_of` filled, its outline as `joined` returns it."""
    area = round(sum(hole.area for hole in holes))
    return replace(one, polygon=joined([one.polygon, *holes]), filled=one.filled + area)


def inside(holes: list[Polygon], others: shapely.STRtree) -> set[int]:
    """Return which objects, by their places in a tree, lie in holes."""
    return {int(place) for hole in holes for place in others.query(hole, predicate="covers")}


def fill_holes(mask: Mask, found: CoreObjects, least: float) -> tuple[Mask, CoreObjects]:
    """Fill holes of less than `least` px in the objects of a core that cannot go on in its neighbors.

    Args:
        mask: (H, W) bool, of the core.
        found: Its objects.
        least: px.

    Returns:
        The mask and the objects; what lay in a hole is none of its own any more.
    """
    closed = found.closed() if least else []
    holes = {piece.label: these for piece in closed if (these := holes_of(piece.polygon, least))}
    if not holes:
        return mask, found
    mask = mask.copy()
    tree = shapely.STRtree([piece.polygon for piece in found.pieces])
    gone: set[int] = set()
    for these in holes.values():
        gone |= inside(these, tree)
        for hole in these:
            paint(mask, hole, found.box.x, found.box.y, True)
    pieces = tuple(
        filled(piece, holes[piece.label]) if piece.label in holes else piece
        for place, piece in enumerate(found.pieces)
        if place not in gone
    )
    return mask, CoreObjects(found.box, pieces, found.edges)
