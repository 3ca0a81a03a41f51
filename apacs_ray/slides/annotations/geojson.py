"""GeoJSON of annotations: QuPath's, and what geopandas, LazySlide and others write; polygons only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from shapely.geometry import GeometryCollection, Polygon

from apacs_ray.errors import BadInput
from apacs_ray.slides.annotations.shapes import (
    MALFORMED,
    READ_FORMATS,
    Drawing,
    Shape,
    class_names,
    polygon_of,
    shortened,
)

GEOMETRIES = {
    name.lower(): name
    for name in (
        *("Point", "MultiPoint", "LineString", "MultiLineString", "LinearRing"),
        *("Polygon", "MultiPolygon", "GeometryCollection"),
    )
}
CLASS_KEYS = ("classification", "class", "class_name", "label", "category", "name")  # the first that is there counts
LONGEST_NAME = 10_000  # characters of a class that is itself JSON, as a table of geopandas keeps QuPath's


def read_geojson(tree: Any) -> Drawing:
    """Return the shapes of a FeatureCollection, a feature, a geometry, or lists of these in any depth.

    QuPath shows a slide from its bounds on, so that is where coordinates begin.

    Args:
        tree: a JSON tree.

    Returns:
        The shapes, px from the slide's bounds on.

    Raises:
        BadInput: bad_annotation; the JSON is of another kind.
    """
    if isinstance(tree, dict) and not _is_geojson(tree):
        keys = ", ".join(shortened(key, 30) for key in list(tree)[:6]) or "none"
        raise BadInput("bad_annotation", f"JSON of another kind (its keys: {keys}); {READ_FORMATS}")
    if not isinstance(tree, dict | list):
        raise BadInput("bad_annotation", f"JSON that is only {shortened(tree, 30)!r}; {READ_FORMATS}")
    return Drawing("GeoJSON", _shapes(tree), "bounds")


def _is_geojson(tree: dict[str, Any]) -> bool:
    features = tree.get("features")
    if isinstance(features, list) and (features or _kind(tree) == "featurecollection"):
        return True
    return "geometry" in tree or _kind(tree) in GEOMETRIES


def _kind(tree: Any) -> str:
    kind: Any = tree.get("type") if isinstance(tree, dict) else None
    return kind.lower() if isinstance(kind, str) else ""


def _shapes(tree: Any) -> Iterator[Shape]:
    pending, number = [tree], 0
    while pending:
        item = pending.pop()
        inner = item.get("features") if isinstance(item, dict) and _kind(item) != "feature" else item
        if isinstance(inner, list):
            pending.extend(reversed(inner))
            continue
        properties = item.get("properties") if isinstance(item, dict) else None
        classes, left_out = _classes_of(properties if isinstance(properties, dict) else {})
        yield Shape(number, classes, _geometry(item), left_out=left_out)
        number += 1


def _geometry(item: Any) -> Polygon | GeometryCollection | str:
    """Return the polygons of a feature or geometry, or why there is none."""
    polygons: list[Polygon] = []
    others: list[str] = []
    pending: list[Any] = [item.get("geometry") if isinstance(item, dict) and "geometry" in item else item]
    try:
        while pending:
            part = pending.pop()
            kind = _kind(part)
            if kind == "geometrycollection":
                pending.extend(reversed(part["geometries"]))
            elif kind == "polygon":
                polygons += _polygon(part["coordinates"])
            elif kind == "multipolygon":  # one by one: overlapping parts are both meant
                polygons += [polygon for rings in part["coordinates"] for polygon in _polygon(rings)]
            else:
                others.append(f"{GEOMETRIES[kind]} has no area" if kind in GEOMETRIES else "no GeoJSON geometry")
    except MALFORMED as error:
        return f"not a geometry: {shortened(error, 120)}"
    if not polygons:
        return others[0] if others else "an empty geometry"
    return polygons[0] if len(polygons) == 1 else GeometryCollection(polygons)


def _polygon(rings: Any) -> list[Polygon]:
    return [polygon_of(rings[0], rings[1:])] if rings else []


def _classes_of(properties: dict[str, Any]) -> tuple[tuple[str, ...], str | None]:
    """Return the names of a feature's class, and why it is no cell by itself, if so.

    QuPath's derived class "A: B" is an A and a B. A star, as in Ignore* and Region*, says that the object is not to be
    measured.

    Args:
        properties: of the feature.

    Returns:
        The names, the fullest first, and the reason.
    """
    for key in CLASS_KEYS:
        names = class_names(*_names(properties.get(key)))
        if names:
            full = ": ".join(names)
            classes = class_names(full, *full.split(": "))
            starred = key == "classification" and any(name.endswith("*") for name in classes)
            left_out = f"class {shortened(full)} is no cell unless data.mask_classes says so" if starred else None
            return classes, left_out
    return (), None


def _names(value: Any) -> list[str]:
    if isinstance(value, str) and value.lstrip().startswith("{") and len(value) <= LONGEST_NAME:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return [value]
    if isinstance(value, dict):
        value = next((value[key] for key in ("names", "name", "value") if value.get(key)), None)
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{value:d}" if abs(value) < 1 << 63 else None
    names = value if isinstance(value, list) else [value]
    return [name for name in names if isinstance(name, str)]
