"""Writers of the same rectangles in every format of annotations that is read."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Rectangle = tuple[int, int, int, int]  # x, y, width, height
SIDE = 64  # px of the picture that they are drawn on


def corners(rectangle: Rectangle) -> list[list[int]]:
    x, y, width, height = rectangle
    return [[x, y], [x + width, y], [x + width, y + height], [x, y + height]]


def features(rectangles: Sequence[Rectangle], cell: str = "Cell") -> list[dict[str, Any]]:
    return [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[*corners(r), corners(r)[0]]]},
            "properties": {"classification": {"name": cell}},
        }
        for r in rectangles
    ]


def collection(rectangles: Sequence[Rectangle], cell: str = "Cell") -> bytes:
    return json.dumps({"type": "FeatureCollection", "features": features(rectangles, cell)}).encode()


def feature_list(rectangles: Sequence[Rectangle], cell: str = "Cell") -> bytes:
    return json.dumps(features(rectangles, cell)).encode()


def collections_in_a_list(rectangles: Sequence[Rectangle], cell: str = "Cell") -> bytes:
    half = len(rectangles) // 2
    return json.dumps([json.loads(collection(r, cell)) for r in (rectangles[:half], rectangles[half:])]).encode()


def odd_geojson(rectangles: Sequence[Rectangle], cell: str = "Cell") -> bytes:
    """Unclosed rings, a third coordinate here and there, a collection of geometries, UTF-16 with its mark."""
    written = []
    for number, feature in enumerate(features(rectangles, cell)):
        ring = [
            [*point, 7] if place % 2 else point for place, point in enumerate(feature["geometry"]["coordinates"][0])
        ]
        polygon = {"type": "Polygon", "coordinates": [ring[:-1] if number % 2 else ring]}
        inner = {"type": "GeometryCollection", "geometries": [{"type": "Point", "coordinates": [1, 1]}, polygon]}
        written.append({"type": "Feature", "geometry": inner, "properties": {"class": cell}})
    return json.dumps({"type": "FeatureCollection", "features": written}).encode("utf-16")


def gzipped(rectangles: Sequence[Rectangle], cell: str = "Cell") -> bytes:
    return gzip.compress(collection(rectangles, cell))


def zipped(rectangles: Sequence[Rectangle], cell: str = "Cell") -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a folder/a.geojson", collection(rectangles, cell))
        packed.writestr("__MACOSX/a folder/._a.geojson", b"\0\5\26\7")
        packed.writestr(".hidden.json", b"{}")
        packed.writestr("readme.txt", b"as exported")
    return sink.getvalue()


def asap(rectangles: Sequence[Rectangle], cell: str = "Cell") -> bytes:
    drawn = "".join(
        f'<Annotation Name="Annotation {n}" Type="Polygon" PartOfGroup="{cell}" Color="#F4FA58"><Coordinates>'
        + "".join(f'<Coordinate Order="{o}" X="{x}" Y="{y}" />' for o, (x, y) in enumerate(corners(rectangle)))
        + "</Coordinates></Annotation>"
        for n, rectangle in enumerate(rectangles)
    )
    groups = f'<AnnotationGroups><Group Name="{cell}" PartOfGroup="None" Color="#64FE2E"/></AnnotationGroups>'
    return (
        f"<?xml version='1.0'?><ASAP_Annotations><Annotations>{drawn}</Annotations>{groups}</ASAP_Annotations>".encode()
    )


def odd_asap(rectangles: Sequence[Rectangle], cell: str = "Cell") -> bytes:
    """A namespace, decimal commas, attributes in another order and quotes, points by their order, another encoding."""
    drawn = "".join(
        f"<a:Annotation PartOfGroup='{cell}' Type='Rectangle'><a:Coordinates>"
        + "".join(
            f"<a:Coordinate Y='{y},0' X = '{x},00' Order='{order}'/>"
            for order, (x, y) in sorted(enumerate(corners(rectangle)), key=lambda point: point[1])
        )
        + "</a:Coordinates></a:Annotation>"
        for rectangle in rectangles
    )
    root = f'<a:ASAP_Annotations xmlns:a="urn:asap"><a:Annotations>{drawn}</a:Annotations></a:ASAP_Annotations>'
    return f'\n<?xml version="1.0" encoding="UTF-16"?>{root}'.lstrip().encode("utf-16")


def imagescope(rectangles: Sequence[Rectangle], cell: str = "Cell") -> bytes:
    """Each rectangle drawn in one of the three ways in which one may be, less a negative one that a second covers."""
    regions = ""
    for number, rectangle in enumerate(rectangles):
        points = corners(rectangle)
        vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in (points[::2] if number % 3 == 2 else points))
        regions += (
            f'<Region Id="{number}" Type="{min(number % 3, 1)}" Text="" NegativeROA="0"><Attributes/>'
            f"<Vertices>{vertices}</Vertices></Region>"
        )
    return (
        f'<Annotations MicronsPerPixel="0.5"><Annotation Id="1" Name="{cell}" Type="4"><Attributes><Attribute '
        'Name="Description" Id="0" Value=""/></Attributes><Regions><RegionAttributeHeaders><AttributeHeader Id="9999" '
        f'Name="Region"/></RegionAttributeHeaders>{regions}</Regions><Plots/></Annotation></Annotations>'
    ).encode()


def _coco(segmentations: Sequence[Any], cell: str) -> bytes:
    annotations = [
        {"id": number, "image_id": 2, "category_id": 7, "segmentation": segmentation, "iscrowd": 0}
        for number, segmentation in enumerate(segmentations)
    ]
    other = {"id": -1, "image_id": 1, "category_id": 7, "segmentation": [[0, 0, SIDE, 0, SIDE, SIDE, 0, SIDE]]}
    images = [
        {"id": 1, "file_name": "b.svs", "width": SIDE, "height": SIDE},
        {"id": 2, "file_name": "slides/A.ome.tif", "width": SIDE, "height": SIDE},
    ]
    categories = [{"id": 7, "name": cell, "supercategory": ""}]
    return json.dumps({"images": images, "annotations": [other, *annotations], "categories": categories}).encode()


def coco_polygons(rectangles: Sequence[Rectangle], cell: str = "Cell") -> bytes:
    return _coco([[[number for point in corners(r) for number in point]] for r in rectangles], cell)


def counts_of(mask: Any) -> list[int]:
    """Run lengths, column by column, of background first."""
    values = np.asarray(mask, bool).T.ravel()
    changes = np.flatnonzero(np.diff(np.concatenate([[False], values])))
    return np.diff(np.concatenate([[0], changes, [len(values)]])).tolist()


def packed_counts(counts: Sequence[int]) -> str:
    text = ""
    for number, count in enumerate(counts):
        value, more = count - (counts[number - 2] if number > 2 else 0), True
        while more:
            bits = value & 31
            value >>= 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + bits + 32 * more)
    return text


def _masks(rectangles: Sequence[Rectangle]) -> list[Any]:
    masks = []
    for x, y, width, height in rectangles:
        mask = np.zeros((SIDE, SIDE), bool)
        mask[y : y + height, x : x + width] = True
        masks.append(mask)
    return masks


def coco_runs(rectangles: Sequence[Rectangle], cell: str = "Cell") -> bytes:
    return _coco([{"counts": counts_of(mask), "size": [SIDE, SIDE]} for mask in _masks(rectangles)], cell)


def coco_packed_runs(rectangles: Sequence[Rectangle], cell: str = "Cell") -> bytes:
    return _coco([{"counts": packed_counts(counts_of(m)), "size": [SIDE, SIDE]} for m in _masks(rectangles)], cell)


FORMATS: dict[str, Callable[..., bytes]] = {
    writer.__name__: writer
    for writer in (
        *(collection, feature_list, collections_in_a_list, odd_geojson, gzipped, zipped),
        *(asap, odd_asap, imagescope, coco_polygons, coco_runs, coco_packed_runs),
    )
}
