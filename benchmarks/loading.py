"""Training samples a second and core, from Parquet shards of 2000 x 2000 tiles to augmented pixels.

Bare: libjpeg-turbo's decoding of the same JPEGs (quality 95, 4:4:4) from memory, nothing else. Ours:
`TileDataset.load` in the order and block size of training, that is reading row groups, decoding image and mask, flips
and quarter turns, with a random crop of 1024 px (the default) and with whole tiles. One thread. Stain jitter runs on
the training device, after the crop; its seconds a crop on this CPU are a row of their own.
"""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import simplejpeg
import torch
from measure import alternate, medians, options, require, show
from PIL import Image
from tiles import write_tiles

from apacs_ray.data.shard_rows import read_rows
from apacs_ray.data.shards import TileIndex, read_index
from apacs_ray.storage import LocalStore, Store
from apacs_ray.training.augment import Augmentation, jitter_stain
from apacs_ray.training.batch import Sample
from apacs_ray.training.dataset import TileDataset
from apacs_ray.training.sampler import schedule

SIDE, BLOCK = 2000, 2  # px of a tile; tiles of a block, as a run's tasks load them


def main() -> None:
    """Measure loading in every way and print the table."""
    arguments = options(__doc__, "8 tiles, 3 repetitions").parse_args()
    torch.set_num_threads(1)
    side, tiles, crop, repetitions = SIDE, 32, 1024, 5
    if arguments.quick:
        tiles, repetitions = 8, 3
    if arguments.smoke:
        side, tiles, crop, repetitions = 128, 4, 64, 1
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        write_tiles(store, side, {"train": tiles}, smear=2 * side)
        index = read_index(store, "train")
        places = [index.place(row) for row in range(len(index))]
        jpegs = [tile["image"] for tile in read_rows(store, [(p.path, p.group, p.row) for p in places], ["image"])]
        crops = torch.rand(1, 3, crop, crop)
        ways: dict[str, Callable[[], Any]] = {
            "bare libjpeg-turbo": lambda: [len(simplejpeg.decode_jpeg(jpeg)) for jpeg in jpegs],
            "bare Pillow": lambda: [np.asarray(Image.open(io.BytesIO(jpeg))).shape for jpeg in jpegs],
            f"ours, crop {crop}": lambda: sum(map(len, _epoch(store, index, crop))),
            "ours, whole tiles": lambda: sum(map(len, _epoch(store, index, 0))),
            "jitter of a crop": lambda: [
                jitter_stain(crops, [(crop, crop)], [seed], 0.1) for seed in range(len(index))
            ],
        }
        bare = sum(
            int(simplejpeg.decode_jpeg(jpeg).sum()) for jpeg in jpegs
        )  # flips and quarter turns do not change it
        ours = sum(int(sample.inputs.sum()) for block in _epoch(store, index, 0) for sample in block)
        require(ours == bare, "whole tiles are not the pixels that were stored")
        seconds = medians(alternate(ways, repetitions))
    rows = [
        {"way": name, "ms_per_tile": 1000 * value / len(jpegs), "tiles_per_s": len(jpegs) / value,
         "ratio": seconds["bare libjpeg-turbo"] / value}
        for name, value in seconds.items()
    ]  # fmt: skip
    size = sum(map(len, jpegs)) / len(jpegs) / 2**20
    show(f"training samples on one core; {len(jpegs)} tiles of {side} px, {size:.2f} MiB each", rows, arguments.json)


def _epoch(store: Store, index: TileIndex, crop: int) -> Iterator[list[Sample]]:
    """Return the samples of one epoch in training order, block by block."""
    dataset = TileDataset(store, None, Augmentation(crop, True, True))
    refs = list(schedule(index.groups(), 0, epochs=range(1), batch_size=4, rank=0, world=1, seed=0))
    wanted = [(ref, index.place(ref.row)) for ref in refs]
    return (dataset.load(wanted[start : start + BLOCK]) for start in range(0, len(wanted), BLOCK))


if __name__ == "__main__":
    main()
