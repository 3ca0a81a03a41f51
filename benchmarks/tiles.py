"""Tile shards of a synthetic smear, for the benchmarks that read tiles."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from apacs_ray.data.grid import Box, grid
from apacs_ray.data.images import encode_image, encode_mask
from apacs_ray.data.shards import Receipt, shard_path, write_table
from apacs_ray.data.tile_rows import TILE_SCHEMA
from apacs_ray.storage import Store
from apacs_ray.synthetic.slide import render, slide_specs

FINGERPRINT = "0" * 16
PER_ROW = 4  # different tiles in a row of the smear


def write_tiles(store: Store, side: int, counts: Mapping[str, int], smear: int = 0) -> None:
    """Write one shard a split: `counts[split]` tiles of `side` px of a smear of `smear` px, repeated when used up."""
    length = smear or PER_ROW * side
    rgb, mask = render(slide_specs(0, length, length, train=1, test=0)[0])
    boxes = list(grid(length, length, side, side, "drop"))
    number = 0
    for split, count in counts.items():
        rows = []
        for _ in range(count):
            rows.append(_row(f"t{number}", boxes[number % len(boxes)], rgb, mask))
            number += 1
        path = shard_path("tiles", split, FINGERPRINT, 0)
        write_table(store, pa.Table.from_pylist(rows, TILE_SCHEMA), Receipt(path, count, count))


def _row(name: str, box: Box, rgb: np.ndarray, mask: np.ndarray) -> dict[str, object]:
    part = np.s_[box.y : box.y + box.height, box.x : box.x + box.width]
    row: dict[str, object] = dict.fromkeys(TILE_SCHEMA.names, 0)
    row |= {"tile_id": name, "slide_id": "s", "width": box.width, "height": box.height, "mask_fraction": 0.5}
    row |= {"image": encode_image(rgb[part], "jpeg", 95, "4:4:4"), "mask": encode_mask(mask[part])}
    return row | {"image_format": "jpeg", "source_uri": "", "source_version": ""}
