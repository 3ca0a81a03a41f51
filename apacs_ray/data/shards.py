"""Tile shards: Parquet files of encoded tiles, each written whole by one task, and read back row by row.

A shard is named by its split, its number and the fingerprint of the ingest, so that a run that goes on finds which
shards are finished; its receipt (what became of its rows) travels in the Parquet footer.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from apacs_ray.errors import ApacsError
from apacs_ray.storage import Store

ROW_GROUP, GROUP_BYTES = 16, 2 << 20  # at most, tiles and bytes: to read one tile is to read its row group
RECEIPT = b"apacs_ray.receipt"
_SHARD = re.compile(r"/split=\w+/[0-9a-f]{8}-\d{5,}\.parquet$")  # what `shard_path` makes; others are not ours
READERS = 16  # threads that read footers, waiting for the store


@dataclass(frozen=True)
class Receipt:
    """The account of one shard: what became of its rows."""

    path: str
    rows_in: int
    rows_out: int
    skipped: dict[str, int] = field(default_factory=dict)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    reused: bool = False


def open_table(stream: pa.NativeFile, name: str, *, pre_buffer: bool = False) -> pq.ParquetFile:
    """Open a Parquet file of plain columns.

    Args:
        stream: the file.
        name: its name, for the error.
        pre_buffer: fetch the columns that are read in one request.

    Returns:
        The open file.

    Raises:
        ApacsError: a column is of another kind. Ray registers a type whose values it unpickles.
    """
    file = pq.ParquetFile(stream, pre_buffer=pre_buffer)
    for column in file.schema_arrow:
        if not _is_plain(column.type):
            raise ApacsError(f"{name}: column {column.name} is of type {column.type}, which no run writes; delete it")
    return file


def _is_plain(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return False
    inner = [kind.value_type] if pa.types.is_dictionary(kind) else [kind.field(n).type for n in range(kind.num_fields)]
    return all(_is_plain(part) for part in inner)


def shard_path(folder: str, split: str, fingerprint: str, number: int) -> str:
    """Return the path of a shard, such as `tiles/split=train/1f3a9c02-00003.parquet`."""
    return f"{folder}/split={split}/{fingerprint[:8]}-{number:05d}.parquet"


def read_receipt(store: Store, path: str) -> Receipt | None:
    """Return the receipt of a finished shard; None when there is no such shard."""
    try:
        with store.open(path) as stream:
            metadata = pq.read_metadata(stream).metadata or {}
    except FileNotFoundError:
        return None
    return Receipt(**{**json.loads(metadata[RECEIPT]), "path": path, "reused": True})


def rows_in_group(table: pa.Table) -> int:
    """Return the rows of each row group of a shard but the last: fewer of large tiles, as training reads at random."""
    return max(1, min(ROW_GROUP, GROUP_BYTES * len(table) // max(1, table.nbytes)))


def write_table(store: Store, table: pa.Table, receipt: Receipt, group: int | None = None) -> None:
    """Write a shard at once: equal rows give equal bytes with equal library versions.

    `group`: rows of a row group, where they must be those of another shard.
    """
    group = group or rows_in_group(table)
    stored = asdict(receipt)
    del stored["reused"]
    table = table.replace_schema_metadata({RECEIPT: json.dumps(stored, sort_keys=True).encode()})
    encoded = [name for name in table.column_names if pa.types.is_binary(table.schema.field(name).type)]
    sink = io.BytesIO()
    with pq.ParquetWriter(
        sink,
        table.schema,
        compression={name: "none" if name in encoded else "zstd" for name in table.column_names},
        use_dictionary=[name for name in table.column_names if pa.types.is_string(table.schema.field(name).type)],
        write_statistics=[name for name in table.column_names if name not in encoded],
    ) as writer:
        writer.write_table(table, row_group_size=group)
    store.write(receipt.path, sink.getvalue())


@dataclass(frozen=True)
class Place:
    """The place where one tile is stored."""

    path: str
    group: int
    row: int
    tile_id: str


@dataclass(frozen=True)
class TileIndex:
    """The places of all tiles of a split, without their pixels.

    Attributes:
        paths: of the shards.
        shard: (N,) int32, of each tile its number in `paths`.
        group: (N,) int32, its row group.
        row: (N,) int32, its row in the group.
        tile_ids: of each tile.
        slide_ids: of each tile.
        largest: px, width x height of the largest tile.
        mask_fraction: (N,) float32, share of each tile that is cell.
    """

    paths: tuple[str, ...]
    shard: np.ndarray[Any, np.dtype[np.int32]]
    group: np.ndarray[Any, np.dtype[np.int32]]
    row: np.ndarray[Any, np.dtype[np.int32]]
    tile_ids: tuple[str, ...]
    slide_ids: tuple[str, ...]
    largest: int  # px, width x height of the largest tile
    mask_fraction: np.ndarray[Any, np.dtype[np.float32]]

    def __len__(self) -> int:
        return len(self.tile_ids)

    def place(self, row: int) -> Place:
        """Return where tile `row` of this index is stored."""
        return Place(self.paths[self.shard[row]], int(self.group[row]), int(self.row[row]), self.tile_ids[row])

    def groups(self) -> list[int]:
        """Return the number of tiles in each row group, in order; the unit of the training shuffle."""
        if not len(self):
            return []
        key = self.shard.astype(np.int64) << 32 | self.group
        edges = np.flatnonzero(np.diff(key)) + 1
        return [int(size) for size in np.diff(np.concatenate([[0], edges, [len(key)]]))]

    def select(self, keep: Sequence[bool] | np.ndarray[Any, np.dtype[np.bool_]]) -> TileIndex:
        """Return the index of the tiles for which `keep` is True."""
        mask = np.asarray(keep, dtype=bool)
        ids = [tile for tile, chosen in zip(self.tile_ids, mask, strict=True) if chosen]
        slides = [slide for slide, chosen in zip(self.slide_ids, mask, strict=True) if chosen]
        return TileIndex(
            self.paths,
            self.shard[mask],
            self.group[mask],
            self.row[mask],
            tuple(ids),
            tuple(slides),
            self.largest,
            self.mask_fraction[mask],
        )


def shard_paths(store: Store, folder: str, split: str) -> list[str]:
    """Return the paths of the committed shards of a split, in order."""
    return sorted(entry.path for entry in store.list(f"{folder}/split={split}") if _SHARD.search(entry.path))


def read_index(store: Store, split: str, folder: str = "tiles") -> TileIndex:
    """Read the index of a committed split, without tiles that have no mask: they can neither teach nor judge."""
    paths = shard_paths(store, folder, split)
    columns = ["tile_id", "slide_id", "width", "height", "mask_fraction"]

    def read(path: str) -> tuple[pa.Table, list[int]]:
        with store.open(path) as stream:
            file = open_table(stream, path)
            groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
            return file.read(columns=columns), groups

    with ThreadPoolExecutor(READERS) as pool:
        shards = list(pool.map(read, paths))
    if not shards:
        nothing = np.zeros(0, np.int32)
        return TileIndex((), nothing, nothing, nothing, (), (), 0, np.zeros(0, np.float32))
    table = pa.concat_tables([part for part, _ in shards])
    areas = table["width"].to_numpy().astype(np.int64) * table["height"].to_numpy()
    index = TileIndex(
        tuple(paths),
        np.concatenate([np.full(len(part), number, np.int32) for number, (part, _) in enumerate(shards)]),
        np.concatenate([np.repeat(np.arange(len(groups), dtype=np.int32), groups) for _, groups in shards]),
        np.concatenate([np.arange(rows, dtype=np.int32) for _, groups in shards for rows in groups]),
        tuple(table["tile_id"].to_pylist()),
        tuple(table["slide_id"].to_pylist()),
        int(areas.max(initial=0)),
        table["mask_fraction"].to_numpy().astype(np.float32),  # NaN where there is no mask
    )
    return index.select(np.asarray(table["mask_fraction"].is_valid()))


def read_rows(store: Store, places: Iterable[tuple[str, int, int]], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Read the given columns of tiles at (path, row group, row), in the order asked; each row group is read once."""
    wanted = list(places)
    groups: dict[tuple[str, int], pa.Table] = {}
    by_path: dict[str, set[int]] = {}
    for path, group, _ in wanted:
        by_path.setdefault(path, set()).add(group)
    for path, numbers in by_path.items():
        with store.open(path) as stream:
            file = open_table(stream, path, pre_buffer=True)  # the columns of a group in one request
            for number in sorted(numbers):
                groups[path, number] = file.read_row_group(number, columns=list(columns))
    return [groups[path, group].slice(row, 1).to_pylist()[0] for path, group, row in wanted]
