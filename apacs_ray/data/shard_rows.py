"""Rows of tile shards: those at given places, as training wants them, and all of them in order.

Round trips to the store are what they cost, so few are made: the columns of neighboring row groups come with one
request, and shards are asked at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from apacs_ray.data.ahead import ahead
from apacs_ray.data.portions import portions
from apacs_ray.data.shards import READERS, open_table
from apacs_ray.storage import Store

Row = dict[str, Any]
SPAN_BYTES = 16 << 20  # of row groups that are read at once, about
LAST = "mask"  # the last large column of a tile: read with those before it, row groups lie without gaps


def read_rows(
    store: Store,
    places: Iterable[tuple[str, int, int]],
    columns: Sequence[str],
    beside: tuple[Callable[[str], str], Sequence[str]] | None = None,
) -> Iterator[Row]:
    """Read tiles at (path, row group, row). Each row group is read once, all shards are asked at the same time.

    Args:
        store: Of the shards.
        places: Of the tiles.
        columns: That are wanted.
        beside: Where more columns of the same rows are: from the path of a shard to that of another one, and which.

    Yields:
        A row for each place, in their order, as soon as its shard has been read.
    """
    wanted = list(places)
    groups: dict[str, set[int]] = {}
    for path, group, _ in wanted:
        groups.setdefault(path, set()).add(group)
    sources: list[tuple[Callable[[str], str], Sequence[str]]] = [(str, columns), *([beside] if beside else [])]
    asked = [
        (there(path), sorted(numbers), names) for path, numbers in groups.items() for there, names in sources
    ]  # in the order in which they are first wanted

    def read(one: tuple[str, list[int], Sequence[str]]) -> dict[int, pa.Table]:
        path, numbers, names = one
        with store.open(path) as stream:
            file = open_table(stream, path, pre_buffer=True)
            table, start, parts = file.read_row_groups(numbers, columns=list(names)), 0, {}
            for number in numbers:
                parts[number] = table.slice(start, file.metadata.row_group(number).num_rows)
                start += len(parts[number])
            return parts

    tables = ahead(read, asked, max(1, min(READERS, len(asked))), len(asked))
    shards = iter(groups)
    there: dict[str, list[dict[int, pa.Table]]] = {}
    for path, group, number in wanted:
        while path not in there:
            there[next(shards)] = [next(tables) for _ in sources]
        row: Row = {}
        for parts in there[path]:
            row |= parts[group].slice(number, 1).to_pylist()[0]
        yield row


@dataclass(frozen=True)
class Shard:
    """A shard of tiles, or of their heatmaps, that is open."""

    file: pq.ParquetFile

    @property
    def group(self) -> int | None:
        """Rows of each row group but the last; None where there is none."""
        return self.file.metadata.row_group(0).num_rows if self.file.num_row_groups else None

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """Yield columns of all rows, in order; the next row groups are read while these are used."""
        names = [*columns, *({LAST} & set(self.file.schema_arrow.names) - set(columns))]

        def read(groups: list[int]) -> pa.Table:
            return self.file.read_row_groups(groups, columns=names).select(list(columns))

        with closing(ahead(read, _spans(self.file.metadata), 1, 1)) as tables:
            for table in tables:
                yield from table.to_pylist()


@contextmanager
def opened_shard(store: Store, path: str) -> Iterator[Shard]:
    """Open a shard of tiles while the block runs, and yield it."""
    with store.open(path) as stream:
        yield Shard(open_table(stream, path, pre_buffer=True))


def _spans(metadata: pq.FileMetaData) -> Iterator[list[int]]:
    """Return neighboring row groups of `SPAN_BYTES`, or one that is larger."""
    numbers = range(metadata.num_row_groups)
    return portions(numbers, lambda number: int(metadata.row_group(number).total_byte_size), SPAN_BYTES)
