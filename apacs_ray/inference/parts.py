"""Parts of a slide's segmentation as workers leave them: shards of cores, Parquet, each written whole by one task."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import shapely

from apacs_ray.data.ahead import ahead
from apacs_ray.data.grid import Box
from apacs_ray.data.images import Mask
from apacs_ray.data.rejects import REJECT_SCHEMA, Reject
from apacs_ray.data.shards import Receipt, open_table, write_table
from apacs_ray.inference.objects import STEPS, CoreObjects, Edges, Piece
from apacs_ray.storage import Store

STRIP = 512  # rows of a mask that are compressed together: a row of the tiles of `mask.ome.tif`
MAPS = ("probability", "disagreement")
LEVEL = 1  # of zlib: strips are read once
AHEAD = 4  # parts that are fetched while one is worked on
_PIECE = pa.struct(
    [
        ("label", pa.int32()),
        ("polygon", pa.binary()),  # WKB
        ("pixels", pa.int64()),
        ("probability", pa.int64()),
        ("disagreement", pa.int64()),
        ("row", pa.int64()),
        ("column", pa.int64()),
        ("filled", pa.int64()),
    ]
)
PART_SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("x", pa.int64()),
        ("y", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("reject", pa.struct(list(REJECT_SCHEMA))),  # why the slide could not be read there; null: it could
        ("mask", pa.list_(pa.binary())),  # strips from the top, packed bits, zlib
        ("pieces", pa.list_(_PIECE)),
        ("edges", pa.binary()),  # labels of the top, bottom, left and right side, int32, zlib
        *((name, pa.list_(pa.binary())) for name in MAPS),  # strips from the top, uint8, zlib
    ]
)


@dataclass(frozen=True)
class FinishedCore:
    """A core whose mask is final.

    Attributes:
        number: Of the core.
        box: Where it lies.
        mask: (H, W) bool.
        objects: In it.
        reject: Why the slide could not be read there, and the mask is empty; None where it could.
        maps: By name, (H / d, W / d) uint8 each, where they are asked for.
    """

    number: int
    box: Box
    mask: Mask
    objects: CoreObjects
    reject: Reject | None = None
    maps: Mapping[str, npt.NDArray[np.uint8]] = field(default_factory=dict)


def part_path(folder: str, shard: int) -> str:
    """Return the path of a shard of cores in the folder of a slide's parts."""
    return f"{folder}/cores-{shard:06d}.parquet"


def write_part(store: Store, path: str, cores: Sequence[FinishedCore]) -> None:
    """Write a shard of cores."""
    table = pa.Table.from_pylist([_row(core) for core in cores], PART_SCHEMA)
    write_table(store, table, Receipt(path, len(cores), len(cores)))


def read_parts(store: Store, folder: str, shards: int, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield columns of all cores of a slide, in reading order; a few parts are fetched ahead.

    Yields:
        A row as a dict.
    """

    def read(number: int) -> pa.Table:
        path = part_path(folder, number)
        with store.open(path) as stream:
            return open_table(stream, path).read(columns=list(columns))

    for table in ahead(read, range(shards), AHEAD, AHEAD):
        for batch in table.to_batches(1):
            yield from batch.to_pylist()


def objects_of(row: dict[str, Any]) -> CoreObjects:
    """Return the objects of a core, from its columns x, y, width, height, pieces and edges."""
    box = Box(row["x"], row["y"], row["width"], row["height"])
    pieces = tuple(
        Piece(
            piece["label"],
            shapely.from_wkb(piece["polygon"]),  # type: ignore[arg-type]
            piece["pixels"],
            piece["probability"],
            piece["disagreement"],
            (piece["row"], piece["column"]),
            piece["filled"],
        )
        for piece in row["pieces"]
    )
    if not pieces:
        return CoreObjects(box, (), None)
    sides = np.frombuffer(zlib.decompress(row["edges"]), np.int32)
    ends = np.cumsum([box.width, box.width, box.height])
    return CoreObjects(box, pieces, Edges(*np.split(sides, ends)))


def map_of(values: npt.NDArray[np.uint16], downsample: int) -> npt.NDArray[np.uint8]:
    """Return values in 1 / `objects.STEPS` as means over squares of `downsample` px, in 1 / 255."""
    height, width = values.shape
    rows, columns = np.arange(0, height, downsample), np.arange(0, width, downsample)
    sums = np.add.reduceat(np.add.reduceat(values.astype(np.int64), rows, axis=0), columns, axis=1)
    counts = np.outer(np.diff(np.append(rows, height)), np.diff(np.append(columns, width)))
    return np.rint(sums / counts * (255 / STEPS)).astype(np.uint8)


def map_strip_of(content: bytes, width: int) -> npt.NDArray[np.uint8]:
    """Return a strip of a core's map, (rows, width) uint8."""
    return np.frombuffer(zlib.decompress(content), np.uint8).reshape(-1, width)


def encode_strip(mask: Mask) -> bytes:
    """Return a strip of a mask, (rows, width) bool, as `strip_of` takes it: packed bits, zlib."""
    return zlib.compress(np.packbits(mask, axis=1).tobytes(), LEVEL)


def strip_of(content: bytes, width: int) -> Mask:
    """Return a strip of a mask, (rows, width) bool."""
    bits = np.frombuffer(zlib.decompress(content), np.uint8).reshape(-1, -(-width // 8))
    return np.unpackbits(bits, axis=1, count=width).astype(bool)


def _row(core: FinishedCore) -> dict[str, Any]:
    edges = b""
    if core.objects.edges is not None:
        sides = (core.objects.edges.top, core.objects.edges.bottom, core.objects.edges.left, core.objects.edges.right)
        edges = zlib.compress(np.concatenate(sides).astype(np.int32).tobytes(), LEVEL)
    pieces = [
        {
            "label": piece.label,
            "polygon": shapely.to_wkb(piece.polygon),
            "pixels": piece.pixels,
            "probability": piece.probability,
            "disagreement": piece.disagreement,
            "row": piece.first[0],
            "column": piece.first[1],
            "filled": piece.filled,
        }
        for piece in core.objects.pieces
    ]
    box = core.box
    return {
        "number": core.number,
        "x": box.x,
        "y": box.y,
        "width": box.width,
        "height": box.height,
        "reject": core.reject and asdict(core.reject),
        "mask": [encode_strip(core.mask[top : top + STRIP]) for top in range(0, len(core.mask), STRIP)],
        "pieces": pieces,
        "edges": edges,
        **{
            name: [zlib.compress(values[top : top + STRIP].tobytes(), LEVEL) for top in range(0, len(values), STRIP)]
            for name, values in core.maps.items()
        },
    }
