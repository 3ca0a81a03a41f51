"""Annotation files of every format: the same areas, truly empty ones, and what must not become "no cell"."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from support.annotation_files import (
    FORMATS,
    SIDE,
    Rectangle,
    asap,
    coco_polygons,
    collection,
    corners,
    counts_of,
    feature_list,
    imagescope,
    packed_counts,
)

from apacs_ray.data.grid import Box
from apacs_ray.errors import BadInput
from apacs_ray.slides.annotations.rasterize import PolygonMask
from apacs_ray.slides.annotations.read import Annotations, read_annotations
from apacs_ray.slides.annotations.run_lengths import outlines, run_lengths
from apacs_ray.slides.reader import Level, SlideInfo

TWO = [(2, 3, 10, 8), (30, 20, 5, 40)]
sides = st.integers(0, SIDE - 2)
rectangles = st.lists(
    st.tuples(sides, sides, st.integers(2, SIDE), st.integers(2, SIDE)).map(
        lambda r: (r[0], r[1], min(r[2], SIDE - r[0]), min(r[3], SIDE - r[1]))
    ),
    min_size=1,
    max_size=5,
)
every_format = pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)


def mask_of(annotations: Annotations, width: int = SIDE, height: int = SIDE) -> Any:
    return PolygonMask(annotations).tile(0, 0, width, height, 1.0)


def refused(content: bytes | str, *classes: str) -> str:
    """Why a file is refused."""
    with pytest.raises(BadInput) as raised:
        read_annotations(content.encode() if isinstance(content, str) else content, "a.json", classes)
    assert raised.value.code == "bad_annotation"
    assert raised.value.reason.startswith("a.json: ")
    return raised.value.reason


# --- the matrix: formats by what is in them


@every_format
@settings(max_examples=25, deadline=None)
@given(drawn=rectangles)
def test_the_same_rectangles_in_every_format(write: Callable[..., bytes], drawn: list[Rectangle]) -> None:
    expected = np.zeros((SIDE, SIDE), bool)
    for x, y, width, height in drawn:
        expected[y : y + height, x : x + width] = True
    for classes in ([], ["Other", "Cell"]):
        annotations = read_annotations(write(drawn), "some/a.geojson.zip", classes)
        assert np.array_equal(mask_of(annotations), expected)
        assert annotations.defects == ()


@every_format
def test_a_truly_empty_file_is_a_slide_without_cells(write: Callable[..., bytes]) -> None:
    for classes in ([], ["Cell"]):
        annotations = read_annotations(write([]), "a", classes)
        assert (annotations.areas, annotations.defects) == ((), ())


@every_format
def test_a_filter_that_leaves_nothing_names_the_classes_that_are_there(write: Callable[..., bytes]) -> None:
    reason = refused(write(TWO, "cell"), "Cell", "Nucleus")
    assert "none of its 2 annotations is of class Cell or Nucleus (data.mask_classes); it has cell (2)" in reason


@pytest.mark.parametrize("write", [collection, feature_list, asap, imagescope, coco_polygons], ids=lambda w: w.__name__)
def test_coordinates_that_are_none_are_not_no_cell(write: Callable[..., bytes]) -> None:
    written = write([(17, 17, 17, 17)]).decode()
    for number in ("NaN", "1e999", '"x"', "1e300"):
        value = number.strip('"') if written.startswith("<") else number
        spoiled = written.replace('"17"', f'"{value}"').replace(" 17,", f" {number},").replace("[17,", f"[{number},")
        assert spoiled != written
        assert "can be drawn" in refused(spoiled)


# --- what is none of the formats


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "an empty file"),
        (" \n", "an empty file"),
        ("cell,x,y\n1,2,3\n", "neither JSON nor XML"),
        ("{", "no JSON"),
        ("3", "neither JSON nor XML"),
        ("{}", "its keys: none"),
        ('{"case": "X", "mpp": 0.5}', "its keys: case, mpp"),
        ('{"version": "5.0", "shapes": [], "imagePath": "a.png"}', "its keys: version, shapes, imagePath"),
        ('{"type": "FeatureCollection"}', "JSON of another kind"),
        ('{"type": "FeatureCollection", "features": null}', "JSON of another kind"),
        ('{"features": []}', "JSON of another kind"),
        ('{"type": "Topology", "objects": {}, "arcs": []}', "JSON of another kind"),
        ('{"features": ["mean", "std"]}', "no GeoJSON geometry (2)"),
        ("[1, 2, 3]", "no GeoJSON geometry (3)"),
        ('[{"x": 1}]', "no GeoJSON geometry (1)"),
        ('{"type": "LineString", "coordinates": [[0, 0], [9, 9]]}', "LineString has no area (1)"),
        ('{"type": "Polygon", "coordinates": []}', "an empty geometry (1)"),
        ('{"type": "Feature", "geometry": null, "properties": {}}', "no GeoJSON geometry (1)"),
        ('{"type": "Polygon", "coordinates": [[[0, 0], [0.9, 0], [0.9, 0.9]]]}', "within one pixel"),
        ('{"images": [], "annotations": []}', "COCO with 0 images"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 2}]}', "of an image that is not listed (1)"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]}', "only a bounding box (1)"),
        ('{"images": [{"id": 1}], "annotations": [3, {"segmentation": 5}]}', "no annotation of COCO (1)"),
        ("<ScanInfo><Barcode>0</Barcode></ScanInfo>", "its root: ScanInfo"),
        ("<annotations><annotation><Coordinates/></annotation></annotations>", "its root: annotations"),
        ("<ASAP_Annotations/>", "its root: ASAP_Annotations"),
        ("<Study><Annotations/></Study>", "its root: Study"),
        ("<Annotations><Annotation/><Note/></Annotations>", "Annotation has no Regions (1), Note has no Regions (1)"),
        ("<ASAP_Annotations><Annotations><Roi/></Annotations></ASAP_Annotations>", "Roi is no annotation (1)"),
        ("<Annotations>", "no plain XML"),
        ("<!DOCTYPE html><html/>", "no plain XML"),
        ('<?xml version="1.0" encoding="idna"?><a/>', "in the encoding idna"),
        (b"\x89PNG\r\n\x1a\n\xff", "no text"),
        (b"\xff\xfe\x00\xd8", "no text"),
        (b"\x1f\x8b\x08", "a damaged gzip file"),
        (gzip.compress(b'{"a": 1}', mtime=0)[:-9], "a damaged gzip file"),
        (gzip.compress(b'{"a": 1}', mtime=0), "its keys: a"),
        (b"PK\x03\x04 and no more", "a damaged zip file"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:40],
)
def test_what_nobody_understands_is_refused(content: bytes | str, words: str) -> None:
    assert words in refused(content)


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        '[{"type": "FeatureCollection", "features": []}]',
        '\ufeff{"type": "FeatureCollection", "features": []}',
        '{"images": [{"id": 1}], "annotations": []}',
        '<Annotations MicronsPerPixel="0.5"/>',
        "<Annotations><Annotation><Regions/></Annotation></Annotations>",
        '<!-- x --><ASAP_Annotations xmlns="a"><Annotations/></ASAP_Annotations>',
    ],
)
def test_nothing_drawn_in_a_file_that_is_understood(content: str) -> None:
    assert read_annotations(content.encode(), "a").areas == ()


def test_zip_files_that_do_not_say_which() -> None:
    def packed(*names: str, **options: Any) -> bytes:
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w", **options) as file:
            for name in names:
                file.writestr(name, collection(TWO))
        return sink.getvalue()

    assert len(read_annotations(packed("x/A.GEOJSON", "notes.txt", "__MACOSX/._A.GEOJSON"), "a").areas) == 2
    assert "with 2 annotations" in refused(packed("a.json", "b.xml"))
    assert "with 0 annotations" in refused(packed("a.txt"))
    assert "not packed by Deflate" in refused(packed("a.json", compression=zipfile.ZIP_LZMA))
    locked = bytearray(packed("a.json"))
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    assert "password" in refused(bytes(locked))
    assert "damaged zip" in refused(packed("a.json").replace(b'"Cell"', b'"Cull"'))
    assert len(read_annotations(gzip.compress(gzip.compress(collection(TWO))), "a").areas) == 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "gbk"])
def test_xml_in_any_encoding(encoding: str) -> None:
    declared = "UTF-16" if "utf" in encoding else encoding  # .NET says UTF-16 whatever it writes then
    text = f'<?xml version="1.0" encoding="{declared}"?>' + asap(TWO, "细胞").decode().partition("?>")[2]
    if encoding == "utf-32":
        text = text.replace(' encoding="UTF-16"', "")
    assert len(read_annotations(text.encode(encoding), "a", ["细胞"]).areas) == 2


# --- GeoJSON


@pytest.mark.parametrize(
    ("properties", "names"),
    [
        ({"classification": {"name": "Cell", "color": [1, 2, 3]}}, ["Cell"]),
        ({"classification": {"names": ["Cell", "Positive"]}}, ["Cell", "Positive", "Cell: Positive"]),
        ({"classification": {"name": "Cell: Positive"}}, ["Cell", "Positive", "Cell: Positive"]),
        ({"classification": "Cell"}, ["Cell"]),
        ({"classification": '{ "name": "Cell", "color": [0, 0, 0] }'}, ["Cell"]),  # as geopandas writes it
        ({"classification": None, "class": "Cell"}, ["Cell"]),
        ({"class": 3}, ["3"]),
        ({"label": {"value": "Cell"}, "name": "the first"}, ["Cell"]),
        ({"objectType": "annotation", "name": " Cell "}, ["Cell"]),
        ({"classification": {"name": "Ignore*"}}, ["Ignore*"]),
    ],
)
def test_classes_of_features(properties: dict[str, Any], names: list[str]) -> None:
    feature = json.loads(collection(TWO))["features"][0] | {"properties": properties}
    content = json.dumps([feature]).encode()
    for name in names:
        assert len(read_annotations(content, "a", [f" {name}"]).areas) == 1
    assert all(f"{name} (1)" in refused(content, "Cel") for name in names)


@pytest.mark.parametrize("properties", [None, {}, [], {"classification": {"color": 1}}, {"class": True}, {"name": ""}])
def test_features_without_a_class(properties: Any) -> None:
    feature = json.loads(collection(TWO))["features"][0] | {"properties": properties}
    assert "it has no class (1)" in refused(json.dumps([feature]), "Cell")
    assert len(read_annotations(json.dumps([feature]).encode(), "a").areas) == 1


def test_regions_and_what_is_to_be_ignored_are_no_cells_unless_asked_for() -> None:
    cell, region = (json.loads(collection(TWO, name))["features"] for name in ("Cell", "Region*"))
    annotations = read_annotations(json.dumps([*region[:1], *cell[1:]]).encode(), "a")
    assert mask_of(annotations).sum() == 5 * 40
    assert [(defect.feature, "data.mask_classes" in defect.reason) for defect in annotations.defects] == [(0, True)]
    assert "class Region* is no cell unless data.mask_classes says so (2)" in refused(json.dumps(region))
    assert len(read_annotations(json.dumps(region).encode(), "a", ["Region*"]).areas) == 2


def test_parts_of_one_feature_that_overlap_are_one_area() -> None:
    rings = [[[*corners(r), corners(r)[0]]] for r in ((0, 0, 10, 10), (5, 5, 10, 10))]
    content = json.dumps({"type": "multipolygon", "coordinates": rings}).encode()
    assert mask_of(read_annotations(content, "a")).sum() == 175


# --- XML


def region(points: Any, kind: int | None = 0, negative: int = 0, text: str = "") -> str:
    vertices = "".join(f'<Vertex Y="{y}" X="{x}"/>' for x, y in points)
    said = "" if kind is None else f'Type="{kind}"'
    return f'<Region {said} NegativeROA="{negative}" Text="{text}"><Vertices>{vertices}</Vertices></Region>'


def layers(*regions: str) -> bytes:
    annotations = (f'<Annotation Name="L{n}"><Regions>{part}</Regions></Annotation>' for n, part in enumerate(regions))
    return f"<Annotations>{''.join(annotations)}</Annotations>".encode()


def test_negative_regions_are_cut_out_of_their_own_layer() -> None:
    square, hole = corners((0, 0, 20, 20)), corners((5, 5, 30, 5))
    own = read_annotations(layers(region(hole, negative=1) + region(square)), "a")
    expected = np.zeros((SIDE, SIDE), bool)
    expected[:20, :20] = True
    expected[5:10, 5:20] = False
    assert np.array_equal(mask_of(own), expected)
    other = read_annotations(layers(region(square), region(hole, negative=1)), "a")
    assert mask_of(other).sum() == 400
    covered = read_annotations(
        layers(region(square) + region(corners((30, 30, 4, 4))) + region(square, negative=1)), "a"
    )
    assert mask_of(covered).sum() == 16
    assert [defect.reason for defect in covered.defects] == ["negative regions cover all of it"]
    assert "negative region (1)" in refused(layers(region(hole, negative=1)))
    assert "negative regions cover all of it (1)" in refused(layers(region(square) + region(square, negative=1)))


def test_negative_regions_that_would_take_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    comb = [[x, y] for x in range(0, 400) for y in ((0, 300) if x % 2 else (300, 0))] + [[400, 301], [-1, 301]]
    across = [[y, x] for x, y in comb]
    assert "negative regions cross it more than 1000 times (1)" in refused(
        layers(region(comb) + region(across, negative=1))
    )
    monkeypatch.setattr("apacs_ray.slides.annotations.areas.MAX_CUTS", 8)
    many = region(corners((0, 0, 9, 9))) * 3 + region(corners((1, 1, 3, 3)), negative=1) * 3
    assert "more than 8 times" in refused(layers(many))


def test_ellipses_rectangles_and_lines_of_imagescope() -> None:
    box = [(10, 10), (50, 40)]
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    inside = ((x - 30) / 20) ** 2 + ((y - 25) / 15) ** 2 < 1
    for points in (box, corners((10, 10, 40, 30)), box[::-1]):
        drawn = mask_of(read_annotations(layers(region(points, 2)), "a"))
        assert (drawn != inside).sum() <= 4
    assert mask_of(read_annotations(layers(region(box, 1)), "a")).sum() == 40 * 30
    assert mask_of(read_annotations(layers(region(corners((1, 1, 4, 4)), None)), "a")).sum() == 16
    annotations = read_annotations(layers(region(box, 1) + region(box, 3) + region(box, 4) + region([], 0)), "a")
    assert [defect.feature for defect in annotations.defects] == [1, 2, 3]
    assert "a region of type 4 has no area (2)" in refused(layers(region(box, 4) * 2))


def test_layers_attributes_and_texts_are_classes_of_imagescope() -> None:
    content = imagescope(TWO, "Layer 1").replace(b'Text=""', b'Text="Mitosis"', 1)
    content = content.replace(b'Name="Description" Id="0" Value=""', b'Name="Smear" Id="0" Value="ASC-H"')
    assert [len(read_annotations(content, "a", [c]).areas) for c in ("Layer 1", "Mitosis", "Smear", "ASC-H")] == [
        2,
        1,
        2,
        2,
    ]
    assert "it has ASC-H (2), Layer 1 (2), Smear (2), Mitosis (1)" in refused(content, "cell")


@pytest.mark.parametrize(("order", "area"), [("0,1,2,3", 80), ("0,2,1,3", 80), ("0,0,0,0", 80), ("x,1,2,3", None)])
def test_the_order_of_asaps_points(order: str, area: int | None) -> None:
    """As it says; where it says the same of all, as they stand."""
    x, y = 2, 3
    points = corners((x, y, 10, 8))
    if order == "0,2,1,3":
        points = [points[0], points[2], points[1], points[3]]
    drawn = "".join(
        f'<Coordinate Order="{o}" X="{a}" Y="{b}"/>' for o, (a, b) in zip(order.split(","), points, strict=True)
    )
    annotation = f'<Annotation Type="Spline"><Coordinates>{drawn}</Coordinates></Annotation>'
    content = asap([]).decode().replace("<Annotations>", f"<Annotations>{annotation}")
    if area is None:
        assert "not a polygon" in refused(content)
    else:
        assert mask_of(read_annotations(content.encode(), "a")).sum() == area


@pytest.mark.parametrize("number", ["1.234,5", "1,234.5", "", "1,2,3"])
def test_numbers_that_are_not_clear_are_not_guessed(number: str) -> None:
    assert "not a polygon" in refused(asap([(17, 17, 9, 9)]).decode().replace('"17"', f'"{number}"'))


# --- COCO


def coco(*images: dict[str, Any], annotations: Any = None) -> bytes:
    ring = [[number for point in corners((10, 10, 20, 20)) for number in point]]
    return json.dumps(
        {"images": images, "annotations": annotations or [{"image_id": images[0]["id"], "segmentation": ring}]}
    ).encode()


def test_which_image_of_a_coco_file_is_the_slide() -> None:
    a, b, other = (
        {"id": 1, "file_name": "x\\A.ome.tiff"},
        {"id": 2, "file_name": "b.svs"},
        {"id": 3, "file_name": "a.svs"},
    )
    for name in ("a.json", "A.ome.json.gz", "in/a.svs.JSON", "a.coco.json"):
        assert len(read_annotations(coco(a, b), name).areas) == 1
        assert read_annotations(coco(b, a), name).areas == ()  # it lists the slide, and nothing on it
    assert len(read_annotations(coco(b), "quite-another.json").areas) == 1
    assert "2 images called a (x\\A.ome.tiff, a.svs): which" in refused(coco(a, b, other))
    assert "2 images, none called so" in refused(coco(b, {"id": 5, "file_name": "slide.1.svs"}))
    one, two = {"id": "1", "file_name": "slide.1.svs"}, {"id": "2", "file_name": "slide.2.svs"}
    assert len(read_annotations(coco(one, two), "slide.1.json").areas) == 1


def test_coco_of_a_small_picture_is_scaled_to_the_slide() -> None:
    info = SlideInfo("test", (Level(400, 200, 1.0),), 0.25, Box(100, 0, 150, 150))
    for width, height, x, y, side in (
        (100, 50, 40, 40, 80),
        (400, 200, 10, 10, 20),
        (75, 75, 120, 20, 40),
        (150, 150, 110, 10, 20),
    ):
        annotations = read_annotations(coco({"id": 1, "width": width, "height": height}), "a").placed(info)
        assert shapely.total_bounds(annotations.areas).tolist() == [x, y, x + side, y + side]
    with pytest.raises(BadInput, match="size_mismatch: drawn on 333 x 50 px"):
        read_annotations(coco({"id": 1, "width": 333, "height": 50}), "a").placed(info)
    with pytest.raises(BadInput, match="bad_annotation: all 2 areas lie outside"):
        read_annotations(collection([(900, 10, 5, 5), (-200, 10, 5, 5)]), "a").placed(info)


def test_parts_and_masks_of_coco_that_do_not_fit() -> None:
    image = {"id": 1, "width": SIDE, "height": SIDE}
    square = [number for point in corners((10, 10, 20, 20)) for number in point]
    wrong = [
        [square[:-1]],
        [[1, 2]],
        [["a"] * 6],
        "rle",
        {"counts": [0, 4], "size": [2, 2]},
        {"counts": [], "size": [SIDE, SIDE]},
    ]
    for segmentation in wrong:
        refused(coco(image, annotations=[{"image_id": 1, "segmentation": segmentation}]))
    flat = coco(image, annotations=[{"image_id": 1, "segmentation": square}])
    twice = coco(image, annotations=[{"segmentation": [square, [n + 10 for n in square]]}])
    assert mask_of(read_annotations(flat, "a")).sum() == 400
    assert mask_of(read_annotations(twice, "a")).sum() == 700


def test_packed_run_lengths_as_cocos_own_library_writes_them() -> None:
    counts, width, height = run_lengths({"size": [7, 9], "counts": "01f02^O00000;N"})
    expected = np.zeros((7, 9), bool)
    expected[2:5, 3:7] = expected[0, 0] = expected[6, 8] = True
    assert (counts, width, height) == (counts_of(expected), 9, 7)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_outlines_of_run_lengths_hold_exactly_their_pixels(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    pixels = data.draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width))
    mask = np.array(pixels).reshape(height, width)
    counts = counts_of(mask)
    assert run_lengths({"size": [height, width], "counts": packed_counts(counts)})[0] == counts
    areas = outlines(counts, height)
    assert all(area.is_valid for area in areas)
    assert sum(area.area for area in areas) == mask.sum()
    assert np.array_equal(mask_of(Annotations(tuple(areas)), width, height), mask)


# --- whatever a file holds


WORDS = """type features geometry geometries coordinates properties classification name names images annotations
categories id image_id file_name width height segmentation counts size Feature FeatureCollection Polygon MultiPolygon
Point GeometryCollection a 1"""
TAGS = "ASAP_Annotations Annotations Annotation Coordinates Coordinate Regions Region Vertices Vertex b:X"
words = st.sampled_from(WORDS.split())
tree = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(words, inner, max_size=6),
    max_leaves=25,
)
tags = st.sampled_from(TAGS.split())
attributes = st.dictionaries(
    st.sampled_from(["X", "Y", "Type", "Order", "NegativeROA", "Name", "PartOfGroup", "Text"]),
    st.sampled_from(["0", "1", "2", "1,5", "-3.5", "1e308", "-1e308", "nan", "inf", "Polygon", "", "1" * 5000]),
)
element = st.recursive(
    st.builds(lambda tag, has: f"<{tag} {' '.join(f'{k}={v!r}' for k, v in has.items())}/>", tags, attributes),
    lambda inner: st.builds(
        lambda tag, has, parts: f"<{tag} {' '.join(f'{k}={v!r}' for k, v in has.items())}>{''.join(parts)}</{tag}>",
        tags,
        attributes,
        st.lists(inner, max_size=5),
    ),
    max_leaves=25,
)


def survives(content: bytes) -> None:
    """It is refused, or it is read, and then it is "no cell" only where nothing was drawn."""
    for classes in ([], ["a"]):
        with contextlib.suppress(BadInput):
            annotations = read_annotations(content, "a", classes)
            assert annotations.areas or not annotations.defects
            mask_of(annotations)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60), st.sampled_from([b"", b"\x1f\x8b\x08", b"PK\x03\x04", b"{", b"[", b"<a", b"\xff\xfe"]))
def test_arbitrary_bytes(content: bytes, start: bytes) -> None:
    survives(start + content)


@settings(max_examples=150, deadline=None)
@given(tree)
def test_arbitrary_json(content: Any) -> None:
    survives(json.dumps(content).encode())


points = st.lists(st.one_of(st.integers(-(10**320), 10**320), st.floats(), st.just("1"), st.none()), max_size=3)
rings = st.lists(
    st.lists(st.lists(st.floats() | st.integers(-5, 70), min_size=2, max_size=2) | points, max_size=7), max_size=3
)


@settings(max_examples=150, deadline=None)
@given(st.lists(rings, max_size=3), st.sampled_from(["Polygon", "MultiPolygon"]))
def test_arbitrary_rings(drawn: list[Any], kind: str) -> None:
    parts = [drawn] if kind == "MultiPolygon" else drawn
    survives(json.dumps([{"type": kind, "coordinates": part} for part in parts]).encode())


@settings(max_examples=120, deadline=None)
@given(element)
def test_arbitrary_xml(content: str) -> None:
    survives(f'<Annotations xmlns:b="b">{content}</Annotations>'.encode())
    survives(content.encode())


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(list(FORMATS.values())))
def test_damaged_files(data: st.DataObject, write: Callable[..., bytes]) -> None:
    content = bytearray(write(TWO))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    survives(bytes(content[: data.draw(st.integers(0, len(content)))]))


def test_files_as_deep_as_a_parser_lets_them() -> None:
    for depth in (10, 300, 900, 5000):
        survives(b"[" * depth + b"]" * depth)
        survives(b'{"type":"GeometryCollection","geometries":[' * depth + b"]}" * depth)
        survives(
            b'[{"type":"Feature","geometry":null,"properties":{"class":'
            + b'{"name":' * depth
            + b"1"
            + b"}" * (depth + 2)
            + b"]"
        )
        survives(b"<Annotations>" + b"<Annotation>" * depth + b"</Annotation>" * depth + b"</Annotations>")
