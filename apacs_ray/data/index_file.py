"""The index of a split in one file: what training must know of every tile without its pixels.

Each shard holds the rows of its own tiles in its footer, so that whoever writes or finds it can hand them on. Ingest
puts those of a split together, as the commit marker names the file by its hash. To read the columns from the shards
takes a request for each column of each row group, some 320 a shard of large tiles.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

INDEX = b"apacs_ray.index"  # in a shard's footer, JSON: `COLUMNS`, and `groups`, the tiles of each row group
PATHS = b"apacs_ray.shards"  # in an index's footer, JSON: paths of the shards
INDEX_FILE = re.compile(r"tiles/_index/\w+-[0-9a-f]{8}\.parquet")
INDEX_SCHEMA = pa.schema(
    [
        pa.field("tile_id", pa.string(), nullable=False),
        pa.field("slide_id", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),  # px
        pa.field("height", pa.int32(), nullable=False),
        pa.field("mask_fraction", pa.float64()),  # 0..1, null where there is no mask
        pa.field("shard", pa.int32(), nullable=False),  # its number among the paths
        pa.field("group", pa.int32(), nullable=False),  # its row group in the shard
        pa.field("row", pa.int32(), nullable=False),  # its row in the group
    ]
)
COLUMNS = ("tile_id", "slide_id", "width", "height", "mask_fraction")  # of a tile shard


def index_path(split: str, fingerprint: str) -> str:
    """Return the path of a split's index; readers of Parquet folders leave out what begins with an underscore."""
    return f"tiles/_index/{split}-{fingerprint[:8]}.parquet"


def index_rows(tiles: pa.Table, group: int) -> str:
    """Return what the index must know of the tiles of a shard whose row groups have `group` rows, as JSON."""
    groups = [min(group, len(tiles) - start) for start in range(0, len(tiles), group)]
    return json.dumps({**{name: tiles[name].to_pylist() for name in COLUMNS}, "groups": groups}, allow_nan=False)


def index_table(shards: Mapping[str, str]) -> pa.Table:
    """Return the index of a split.

    Args:
        shards: `index_rows` of each shard, by its path.

    Returns:
        A table of `INDEX_SCHEMA`, shards in the order of their paths, which the metadata names under `PATHS`.
    """
    paths = sorted(shards)
    parts = [_shard_table(number, json.loads(shards[path])) for number, path in enumerate(paths)]
    table = pa.concat_tables([INDEX_SCHEMA.empty_table(), *parts])
    return table.replace_schema_metadata({PATHS: json.dumps(paths).encode()})


def _shard_table(number: int, shard: Mapping[str, Any]) -> pa.Table:
    groups = np.asarray(shard["groups"], np.int32)
    columns = {
        **{name: shard[name] for name in COLUMNS},
        "shard": np.full(groups.sum(), number, np.int32),
        "group": np.repeat(np.arange(len(groups), dtype=np.int32), groups),
        "row": np.concatenate([np.arange(rows, dtype=np.int32) for rows in groups] or [groups]),
    }
    return pa.table(columns, INDEX_SCHEMA)


def encode_index(table: pa.Table) -> bytes:
    """Return an index as a Parquet file: equal rows give equal bytes with equal library versions."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def index_hash(content: bytes) -> str:
    """Return the hash by which a commit marker names an index."""
    return hashlib.sha256(content).hexdigest()
