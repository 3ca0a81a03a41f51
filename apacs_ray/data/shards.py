"""Tile shards: Parquet files of encoded tiles, each written whole by one task, and read back row by row.

A shard is named by its split, its number and the fingerprint of the ingest, so that a run that goes on finds which
shards are finished; its receipt (what became of its rows) travels in the Parquet footer.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from apacs_ray.data.index_file import (
    COLUMNS,
    INDEX,
    PATHS,
    encode_index,
    index_hash,
    index_path,
    index_rows,
    index_table,
)
from apacs_ray.errors import ApacsError
from apacs_ray.storage import Store

ROW_GROUP, GROUP_BYTES = 16, 2 << 20  # at most, tiles and bytes: to read one tile is to read its row group
RECEIPT = b"apacs_ray.receipt"
_SHARD = re.compile(r"/split=\w+/[0-9a-f]{8}-\d{5,}\.parquet$")  # what `shard_path` makes; others are not ours
READERS = 16  # threads that read footers, waiting for the store
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Receipt:
    """The account of one shard: what became of its rows.

    Attributes:
        path: Of the shard.
        rows_in: Rows that it was to hold.
        rows_out: Rows that it holds.
        skipped: Rows that were skipped, by reason.
        rejects: Rows of `rejects/`.
        reused: Whether it was finished before.
        index: `index_rows` of its tiles; empty for a shard of something else.
    """

    path: str
    rows_in: int
    rows_out: int
    skipped: dict[str, int] = field(default_factory=dict)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    reused: bool = False
    index: str = ""


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
    index = metadata.get(INDEX, b"").decode()
    return Receipt(**{**json.loads(metadata[RECEIPT]), "path": path, "reused": True, "index": index})


def read_finished(store: Store, path: str) -> Receipt | None:
    """Return the receipt of a finished shard of tiles, with its `index`; None when there is no such shard."""
    receipt = read_receipt(store, path)
    return receipt if receipt is None or receipt.index else replace(receipt, index=_read_index_rows(store, path))


def rows_in_group(table: pa.Table) -> int:
    """Return the rows of each row group of a shard but the last: fewer of large tiles, as training reads at random."""
    return max(1, min(ROW_GROUP, GROUP_BYTES * len(table) // max(1, table.nbytes)))


def write_table(store: Store, table: pa.Table, receipt: Receipt, group: int | None = None) -> None:
    """Write a shard at once: equal rows give equal bytes with equal library versions.

    `group`: rows of a row group, where they must be those of another shard.
    """
    group = group or rows_in_group(table)
    stored = asdict(receipt)
    del stored["reused"], stored["index"]
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
        if receipt.index:  # not with the schema, which the footer holds twice
            writer.add_key_value_metadata({INDEX: receipt.index.encode()})
    store.write(receipt.path, sink.getvalue())


def write_tiles(store: Store, tiles: pa.Table, receipt: Receipt) -> Receipt:
    """Write a shard of tiles, and return its receipt with the `index` that its footer holds."""
    receipt = replace(receipt, index=index_rows(tiles, group := rows_in_group(tiles)))
    write_table(store, tiles, receipt, group)
    return receipt


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


def write_index(store: Store, split: str, fingerprint: str, receipts: Iterable[Receipt]) -> str:
    """Write the index of a split, before it is committed.

    Args:
        store: The run.
        split: Its name.
        fingerprint: Of the ingest.
        receipts: Of its shards.

    Returns:
        The hash that the commit marker must name for the index to be read.
    """
    content = encode_index(index_table({receipt.path: receipt.index for receipt in receipts}))
    store.write(index_path(split, fingerprint), content)
    return index_hash(content)


def read_index(
    store: Store, split: str, folder: str = "tiles", *, committed: tuple[str, str] | None = None
) -> TileIndex:
    """Read the index of a committed split, without tiles that have no mask: they can neither teach nor judge.

    Args:
        store: The run.
        split: Its name.
        folder: Of its shards.
        committed: Path and hash of its index file. Without it, or where the file is not the one that was committed,
            the shards are read, with some hundred requests each.

    Returns:
        The places of its tiles.
    """
    table = _read_index_file(store, *committed) if committed else None
    if table is None:
        paths = shard_paths(store, folder, split)
        with ThreadPoolExecutor(READERS) as pool:
            table = index_table(
                dict(zip(paths, pool.map(lambda path: _read_index_rows(store, path), paths), strict=True))
            )
    areas = table["width"].to_numpy().astype(np.int64) * table["height"].to_numpy()
    annotated = table.filter(table["mask_fraction"].is_valid())
    slides = annotated["slide_id"].combine_chunks().dictionary_encode()
    names = slides.dictionary.to_pylist()  # each name once in memory, and once where the index is sent
    return TileIndex(
        tuple(json.loads(table.schema.metadata[PATHS])),
        annotated["shard"].to_numpy(),
        annotated["group"].to_numpy(),
        annotated["row"].to_numpy(),
        tuple(annotated["tile_id"].to_pylist()),
        tuple(names[number] for number in slides.indices.to_pylist()),
        int(areas.max(initial=0)),
        annotated["mask_fraction"].to_numpy().astype(np.float32),
    )


def _read_index_file(store: Store, path: str, sha256: str) -> pa.Table | None:
    """Return the index in a file; None when it is gone, or is not the one with this hash."""
    try:
        content = store.read(path)
    except FileNotFoundError:
        content = b""
    if index_hash(content) != sha256:
        log.warning("%s: is not what was committed; the index is read from the shards, which takes longer", path)
        return None
    return open_table(pa.BufferReader(content), path).read()


def _read_index_rows(store: Store, path: str) -> str:
    """Return `index_rows` of a shard: what its footer holds, or, of an older one, its columns."""
    with store.open(path) as stream:
        file = open_table(stream, path)
        rows = (file.metadata.metadata or {}).get(INDEX)
        if rows is not None:
            return rows.decode()
        group = file.metadata.row_group(0).num_rows if file.num_row_groups else 1
        return index_rows(file.read(columns=list(COLUMNS)), group)
