"""Objects as GeoParquet 1.1, a row each: what geopandas, DuckDB and pyarrow read, by columns and in parts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from apacs_ray.outputs.rows import ObjectRow

BATCH = 500  # rows that wait as objects; as columns they take a fifth
ROW_GROUP = 4 * BATCH  # some MB of outlines


def _field(name: str, kind: pa.DataType, unit: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable, {"unit": unit} if unit else None)


# In the order of ObjectRow. px: of the full resolution, from the slide's bounds
SCHEMA = pa.schema(
    [
        _field("object_id", pa.string(), ""),
        _field("geometry", pa.binary(), "px"),
        _field("area_um2", pa.float64(), "um^2", nullable=True),
        _field("perimeter_um", pa.float64(), "um", nullable=True),
        _field("centroid_x", pa.float64(), "px"),
        _field("centroid_y", pa.float64(), "px"),
        _field("left", pa.float64(), "px"),
        _field("top", pa.float64(), "px"),
        _field("right", pa.float64(), "px"),
        _field("bottom", pa.float64(), "px"),
        _field("eccentricity", pa.float64(), "1", nullable=True),
        _field("probability", pa.float32(), "1", nullable=True),
        _field("disagreement", pa.float32(), "1", nullable=True),
        _field("pixels", pa.int64(), "px"),
        _field("touches_border", pa.bool_(), ""),
    ]
)


class GeoParquetWriter:
    """Write objects into a file: `with GeoParquetWriter(path) as writer: writer.write(row)`.

    A row group is held in memory. Equal rows give equal bytes with equal library versions. An exception inside leaves a
    file without `geo`, which is no GeoParquet.

    Attributes:
        rows: how many were written.
    """

    def __init__(self, target: Path | str | IO[bytes]) -> None:
        self.rows = 0
        self._waiting: list[ObjectRow] = []
        self._batches: list[pa.RecordBatch] = []
        self._kinds: set[str] = set()
        self._bounds = [math.inf, math.inf, -math.inf, -math.inf]
        unsorted = ("object_id", "geometry")  # their statistics and dictionaries would only take room
        self._parquet = pq.ParquetWriter(
            target,
            SCHEMA,
            compression="zstd",
            use_dictionary=False,
            write_statistics=[name for name in SCHEMA.names if name not in unsorted],
        )

    def __enter__(self) -> GeoParquetWriter:
        return self

    def write(self, row: ObjectRow) -> None:
        """Append one object; numbers that are not known (NaN) become null."""
        self._waiting.append(row)
        self.rows += 1
        if len(self._waiting) == BATCH:
            self._to_columns()
            if self.rows % ROW_GROUP == 0:
                self._write_group()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._to_columns()
            self._write_group()
            self._parquet.add_key_value_metadata({"geo": self._geo()})
        self._parquet.close()

    def _to_columns(self) -> None:
        rows, self._waiting = self._waiting, []
        if not rows:
            return
        geometries = [row.geometry for row in rows]
        self._kinds.update(geometry.geom_type for geometry in geometries)
        left, top, right, bottom = shapely.total_bounds(geometries)
        for side, (value, better) in enumerate(((left, min), (top, min), (right, max), (bottom, max))):
            self._bounds[side] = better(self._bounds[side], float(value))
        columns = []
        for field in SCHEMA:
            if field.name == "geometry":
                columns.append(pa.array(shapely.to_wkb(geometries, byte_order=1), field.type))
            else:
                # from_pandas: NaN becomes null
                values = [getattr(row, field.name) for row in rows]
                columns.append(pa.array(values, field.type, from_pandas=True))
        self._batches.append(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))

    def _write_group(self) -> None:
        batches, self._batches = self._batches, []
        if batches:
            self._parquet.write_table(pa.Table.from_batches(batches), row_group_size=ROW_GROUP)

    def _geo(self) -> str:
        """Return GeoParquet's metadata. crs null: the plane of an image, not the Earth."""
        column: dict[str, Any] = {"encoding": "WKB", "geometry_types": sorted(self._kinds), "crs": None}
        if self.rows:
            column["bbox"] = self._bounds
        return json.dumps({"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}})
