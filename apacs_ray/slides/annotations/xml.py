"""XML of annotations, ASAP's and Aperio ImageScope's, which call quite different things by the same names.

ASAP: ASAP_Annotations/Annotations/Annotation/Coordinates/Coordinate. ImageScope: Annotations/Annotation (a layer)
/Regions/Region/Vertices/Vertex. Both count from level 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree.ElementTree import Element

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import ParseError, fromstring
from shapely.geometry import Polygon, box

from apacs_ray.errors import BadInput
from apacs_ray.slides.annotations.shapes import (
    MALFORMED,
    READ_FORMATS,
    Drawing,
    Shape,
    class_names,
    ellipse,
    polygon_of,
    positions,
    require_bounded,
    shortened,
)

ASAP_AREAS = ("Polygon", "Spline", "Rectangle")
FREEHAND, RECTANGLE, ELLIPSE = "0", "1", "2"  # types of ImageScope's regions; others are lines and arrows


def read_xml(text: str) -> Drawing:
    """Return the shapes of an XML file, level-0 px.

    Args:
        text: the file's.

    Returns:
        Its shapes.

    Raises:
        BadInput: bad_annotation; it is no XML, one that would expand entities, or one of another kind.
    """
    require_bounded(text, "<=")
    try:
        root = fromstring(text, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:
        raise BadInput("bad_annotation", f"no plain XML: {shortened(error, 120)}") from error
    _forget_namespaces(root)
    lists = list(root.iter("Annotations"))
    drawn = [child for annotations in lists for child in annotations]
    if lists and (root.tag == "ASAP_Annotations" or any(child.find("Coordinates") is not None for child in drawn)):
        return Drawing("ASAP's XML", _asap_shapes(drawn))
    if root.tag == "Annotations" or any(child.find("Regions") is not None for child in drawn):
        return Drawing("ImageScope's XML", _imagescope_shapes(drawn))
    raise BadInput("bad_annotation", f"XML of another kind (its root: {shortened(root.tag)}); {READ_FORMATS}")


def _forget_namespaces(root: Element) -> None:
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        if any("}" in name for name in element.attrib):
            element.attrib = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}


def _asap_shapes(drawn: list[Element]) -> Iterator[Shape]:
    for number, annotation in enumerate(drawn):
        classes = class_names(annotation.get("PartOfGroup"))
        yield Shape(number, classes, _asap_polygon(annotation))


def _asap_polygon(annotation: Element) -> Polygon | str:
    if annotation.tag != "Annotation":
        return f"{shortened(annotation.tag)} is no annotation"
    if annotation.get("Type") not in ASAP_AREAS:
        return f"type {shortened(annotation.get('Type'))} has no area"
    try:
        points = [
            (int(point.get("Order", place)), _number(point, "X"), _number(point, "Y"))
            for place, point in enumerate(annotation.iter("Coordinate"))
        ]
        return polygon_of([(x, y) for _, x, y in sorted(points, key=lambda point: point[0])])
    except MALFORMED as error:
        return f"not a polygon: {shortened(error, 120)}"


def _number(point: Element, name: str) -> float:
    """Return a coordinate; a comma is the decimal mark of some countries and never a separator of thousands."""
    return float(point.attrib[name].replace(",", "."))


def _imagescope_shapes(drawn: list[Element]) -> Iterator[Shape]:
    number = 0
    for place, layer in enumerate(drawn):
        regions = layer.find("Regions")
        if layer.tag != "Annotation" or regions is None:
            yield Shape(number, (), f"{shortened(layer.tag)} has no Regions", place)
            number += 1
            continue
        names = [layer.get("Name"), *_attributes(layer)]
        for region in regions.iter("Region"):
            classes = class_names(*names, region.get("Text"), *_attributes(region))
            negative = region.get("NegativeROA", "0").strip() == "1"
            yield Shape(number, classes, _imagescope_polygon(region), place, negative)
            number += 1


def _attributes(element: Element) -> Iterator[str | None]:
    """Yield what people write into the attributes of a layer or region."""
    for attribute in element.iterfind("Attributes/Attribute"):
        name = attribute.get("Name", "")
        yield attribute.get("Value")
        yield None if name == "Description" or name.isdigit() else name


def _imagescope_polygon(region: Element) -> Polygon | str:
    kind = region.get("Type", FREEHAND).strip()
    if kind not in (FREEHAND, RECTANGLE, ELLIPSE):
        return f"a region of type {shortened(kind)} has no area"
    try:
        vertices = [(_number(vertex, "X"), _number(vertex, "Y")) for vertex in region.iterfind("Vertices/Vertex")]
        if not vertices:
            return "a region without vertices"
        points = positions(vertices)
        (left, top), (right, bottom) = points.min(axis=0), points.max(axis=0)
        if kind == ELLIPSE and len(points) <= 5:  # all corners of its box, or two
            return ellipse(left, top, right, bottom)
        return box(left, top, right, bottom) if kind == RECTANGLE and len(points) == 2 else Polygon(points)
    except MALFORMED as error:
        return f"not a polygon: {shortened(error, 120)}"
