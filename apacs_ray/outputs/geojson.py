"""Objects as GeoJSON that QuPath 0.4 and later opens: a gzip'd FeatureCollection of detections, written row by row."""

from __future__ import annotations

import gzip
import json
import math
from types import TracebackType
from typing import IO, Any

import shapely

from apacs_ray.outputs.rows import ObjectRow

CLASS_NAME = "Cell"
CLASS_COLOR = (40, 110, 200)  # QuPath loads nothing of a file with a class that has a name and no color
GZIP_LEVEL = 6
# of each measurement its name, as QuPath shows it, and the row's field
MEASUREMENTS = {
    "Area um^2": "area_um2",
    "Perimeter um": "perimeter_um",
    "Area px^2": "pixels",
    "Eccentricity": "eccentricity",
    "Probability": "probability",
    "Disagreement": "disagreement",
    "Touches border": "touches_border",  # 0 or 1
}


class GeoJsonWriter:
    """Write objects into a stream, in constant memory: `with GeoJsonWriter(stream) as writer: writer.write(row)`.

    Equal rows give equal bytes. An exception inside leaves the collection without its end, so that nobody takes it for
    whole.

    Attributes:
        rows: how many were written.
    """

    def __init__(self, stream: IO[bytes], class_name: str = CLASS_NAME) -> None:
        self.rows = 0
        # neither a time nor a file's name in its header
        self._gzip = gzip.GzipFile(filename="", mode="wb", compresslevel=GZIP_LEVEL, fileobj=stream, mtime=0)
        self._class = json.dumps({"name": class_name, "color": CLASS_COLOR}, separators=(",", ":"))

    def __enter__(self) -> GeoJsonWriter:
        self._gzip.write(b'{"type":"FeatureCollection","features":[')
        return self

    def write(self, row: ObjectRow) -> None:
        """Append one object.

        Args:
            row: its measurements that are not finite are left out, as QuPath wants it.
        """
        feature = (
            f'{{"type":"Feature","id":{json.dumps(row.object_id)},"geometry":{shapely.to_geojson(row.geometry)},'
            f'"properties":{{"objectType":"detection","classification":{self._class},'
            f'"measurements":{_measurements(row)}}}}}'
        )
        self._gzip.write((",\n" if self.rows else "\n").encode() + feature.encode())
        self.rows += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self._gzip.write(b"\n]}\n")
        self._gzip.close()  # the stream stays open


def _measurements(row: ObjectRow) -> str:
    values = {name: _number(getattr(row, field)) for name, field in MEASUREMENTS.items()}
    return json.dumps({name: value for name, value in values.items() if math.isfinite(value)}, separators=(",", ":"))


def _number(value: Any) -> float:
    """Return a measurement with the digits that it has: 6 say more than any pixel can."""
    return int(value) if isinstance(value, int) else float(f"{value:.6g}")
