"""Polygons and mask images as tiles: exact at tile borders, in every known format, and damaged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pyvips
import shapely
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from PIL import Image
from support.geojson import INFO, collection, polygon

from apacs_ray.data.grid import Box
from apacs_ray.errors import BadInput
from apacs_ray.slides.annotations.rasterize import PolygonMask
from apacs_ray.slides.annotations.read import Annotations, read_annotations
from apacs_ray.slides.mask_sources import ImageMask, open_masks

coordinate = st.floats(-20, 120, allow_nan=False, width=32)
points = st.lists(st.tuples(coordinate, coordinate), min_size=3, max_size=12)


def read_geojson(content: bytes, classes: Sequence[str] = ()) -> Annotations:
    return read_annotations(content, "a.geojson", classes)


def drawn(*rings: Any) -> Annotations:
    """The areas of rings; where none of them has an area, the example is no good."""
    try:
        return read_geojson(collection(*(polygon([list(point) for point in ring]) for ring in rings)))
    except BadInput:
        reject()


@settings(max_examples=80, deadline=None)
@given(
    shapes=st.lists(points, min_size=1, max_size=4), side=st.integers(7, 60), x=st.integers(0, 30), y=st.integers(0, 30)
)
def test_tiles_put_together_are_the_whole(shapes: list[Any], side: int, x: int, y: int) -> None:
    mask = PolygonMask(drawn(*shapes))
    whole = mask.tile(x, y, 100, 90, 1.0)
    for top in range(0, 90, side):
        for left in range(0, 100, side):
            high, wide = min(side, 90 - top), min(side, 100 - left)
            part = mask.tile(x + left, y + top, wide, high, 1.0)
            assert np.array_equal(part, whole[top : top + high, left : left + wide])


@settings(max_examples=80, deadline=None)
@given(ring=points, downsample=st.sampled_from([1.0, 2.0, 0.5, 1.7]))
def test_a_pixel_is_in_when_its_center_is(ring: list[Any], downsample: float) -> None:
    annotations = drawn(ring)
    mask = PolygonMask(annotations).tile(3, 5, 50, 40, downsample)
    area = shapely.union_all(list(annotations.areas))
    x, y = np.meshgrid(3 + (np.arange(50) + 0.5) * downsample, 5 + (np.arange(40) + 0.5) * downsample)
    centers = shapely.points(x, y)
    clear = shapely.distance(centers, area.boundary) > 1e-6  # on an edge, a center belongs to one side by convention
    assert np.array_equal(mask[clear], shapely.contains(area, centers)[clear])


def test_neighbors_share_no_pixel_and_leave_none() -> None:
    """Edges through pixel centers: each center belongs to exactly one of the two."""
    left = PolygonMask(read_geojson(collection(polygon([[0, 0], [10.5, 0], [10.5, 20], [0, 20]]))))
    right = PolygonMask(read_geojson(collection(polygon([[10.5, 0], [20, 0], [20, 20], [10.5, 20]]))))
    a, b = left.tile(0, 0, 20, 20, 1.0), right.tile(0, 0, 20, 20, 1.0)
    assert not (a & b).any()
    assert (a | b).all()
    assert a.sum() == 10 * 20


def test_holes_multipolygons_lists_and_single_features() -> None:
    square, hole = [[0, 0], [20, 0], [20, 20], [0, 20]], [[5, 5], [15, 5], [15, 15], [5, 15]]
    with_hole = PolygonMask(read_geojson(json.dumps([polygon(square, hole)]).encode())).tile(0, 0, 20, 20, 1.0)
    assert with_hole.sum() == 300
    assert not with_hole[5:15, 5:15].any()
    parts = {"type": "MultiPolygon", "coordinates": [[[*square, square[0]]], [[[30, 0], [40, 0], [40, 5], [30, 0]]]]}
    assert len(read_geojson(json.dumps(parts).encode()).areas) == 2
    assert len(read_geojson(json.dumps(polygon(square)).encode()).areas) == 1


def test_only_the_classes_asked_for() -> None:
    named = polygon([[0, 0], [9, 0], [9, 9]]) | {"properties": {"classification": {"name": "Cell"}}}
    other = polygon([[0, 0], [9, 0], [9, 9]]) | {"properties": {"classification": {"name": "Artifact"}}}
    assert len(read_geojson(collection(named, other, polygon([[0, 0], [9, 0], [9, 9]])), ["Cell"]).areas) == 1


def test_invalid_polygons_are_repaired_or_named() -> None:
    bowtie = polygon([[0, 0], [10, 10], [10, 0], [0, 10]])
    flat = polygon([[0, 0], [5, 5], [10, 10]])
    point = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}
    wild = polygon([[0, 0], [float("inf"), 5], [10, 10]])
    annotations = read_geojson(collection(bowtie, flat, point, {"geometry": None}, wild, "text"))
    assert annotations.repaired >= 1
    assert len(annotations.areas) == 2
    assert [defect.feature for defect in annotations.defects] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("content", [b"", b"{", b"3", b"[" * 100_000, b"\xff\xfe"])
def test_what_is_no_geojson_is_refused(content: bytes) -> None:
    with pytest.raises(BadInput, match="bad_annotation"):
        read_geojson(content)


ASAP = """<?xml version="1.0"?><ASAP_Annotations><Annotations>
<Annotation Name="A" Type="Polygon" PartOfGroup="cell"><Coordinates><Coordinate Order="1" X="10" Y="0"/>
<Coordinate Order="0" X="0" Y="0"/><Coordinate Order="2" X="10" Y="10"/>
<Coordinate Order="3" X="0" Y="10"/></Coordinates>
</Annotation><Annotation Name="B" Type="Dot" PartOfGroup="cell"><Coordinates><Coordinate Order="0" X="1" Y="1"/>
</Coordinates></Annotation></Annotations></ASAP_Annotations>"""


def test_asap() -> None:
    annotations = read_annotations(ASAP.encode(), "a.xml", ["cell"])
    assert PolygonMask(annotations).tile(0, 0, 12, 12, 1.0).sum() == 100
    assert [defect.feature for defect in annotations.defects] == [1]
    with pytest.raises(BadInput, match=r"none of its 2 annotations is of class nothing .*; it has cell \(2\)"):
        read_annotations(ASAP.encode(), "a.xml", ["nothing"])


def test_xml_bombs_do_not_go_off() -> None:
    bomb = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;">]><a>&c;</a>'
    with pytest.raises(BadInput, match="bad_annotation"):
        read_annotations(bomb.encode(), "a.xml")
    with pytest.raises(BadInput, match="bad_annotation"):
        read_annotations(b"<a><b></a>", "a.xml")


def test_geojson_begins_at_the_bounds_and_asap_at_level_0(tmp_path: Path) -> None:
    (tmp_path / "s.geojson").write_bytes(collection(polygon([[0, 0], [10, 0], [10, 10], [0, 10]])))
    (tmp_path / "s.xml").write_text(ASAP)
    geojson = open_masks("geojson", [(tmp_path / "s.geojson", 0, 0)], INFO)
    assert geojson.tile(40, 20, 10, 10, 1.0).all()
    asap = open_masks("xml", [(tmp_path / "s.xml", 0, 0)], INFO)
    assert asap.tile(0, 0, 10, 10, 1.0).all()
    assert not asap.tile(40, 20, 10, 10, 1.0).any()
    assert "annotation 1" in asap.defects[0]


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("of_bounds", [False, True])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_mask_images_of_the_slide_or_its_bounds(tmp_path: Path, factor: int, of_bounds: bool, suffix: str) -> None:
    part = INFO.bounds if of_bounds else Box(0, 0, INFO.width, INFO.height)
    small = np.random.default_rng(0).random((-(-part.height // factor), -(-part.width // factor))) < 0.4
    path = tmp_path / f"m.{suffix}"
    if suffix == "png":
        Image.fromarray(small).save(path)
    else:
        pyvips.Image.new_from_array(small.astype(np.uint8) * 255).tiffsave(
            str(path), tile=True, pyramid=True, compression="deflate"
        )
    expected = np.zeros((INFO.height + 10, INFO.width + 10), bool)
    large = small.repeat(factor, axis=0).repeat(factor, axis=1)
    expected[part.y : part.y + large.shape[0], part.x : part.x + large.shape[1]] = large
    mask = ImageMask(path, INFO, None)
    assert np.array_equal(mask.tile(0, 0, INFO.width + 10, INFO.height + 10, 1.0), expected)
    assert np.array_equal(mask.tile(33, 17, 90, 70, 1.0), expected[17:87, 33:123])
    assert np.array_equal(mask.tile(10, 10, 40, 30, 3.0), expected[11:101:3, 11:131:3])


def test_mask_images_that_do_not_fit_or_are_gray(tmp_path: Path) -> None:
    Image.new("L", (290, 200)).save(tmp_path / "size.png")
    with pytest.raises(BadInput, match="size_mismatch"):
        ImageMask(tmp_path / "size.png", INFO, None)
    Image.linear_gradient("L").resize((300, 200)).save(tmp_path / "gray.png")
    with pytest.raises(BadInput, match="grey_mask"):
        ImageMask(tmp_path / "gray.png", INFO, None).tile(0, 0, 300, 200, 1.0)
    assert 0.3 < ImageMask(tmp_path / "gray.png", INFO, 128).tile(0, 0, 300, 200, 1.0).mean() < 0.7
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(BadInput, match="unreadable"):
        ImageMask(tmp_path / "bad.png", INFO, None)


def test_masks_of_single_fovs_leave_the_rest_unannotated(tmp_path: Path) -> None:
    cells = np.zeros((50, 60), bool)
    cells[10:20, 5:25] = True
    for x in (0, 60):
        Image.fromarray(cells).save(tmp_path / f"s_{x}_100.png")
    masks = open_masks("fovs", [(tmp_path / "s_0_100.png", 0, 100), (tmp_path / "s_60_100.png", 60, 100)], INFO)
    assert np.array_equal(masks.tile(0, 100, 60, 50, 1.0), cells)
    assert np.array_equal(masks.tile(30, 100, 60, 50, 1.0), np.hstack([cells[:, 30:], cells[:, :30]]))
    assert masks.tile(0, 90, 60, 50, 1.0) is None
