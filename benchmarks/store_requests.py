"""Requests and seconds of every stage that reads tiles, from an S3 that answers late: index, training, prediction.

The store is moto behind the proxy of the tests, which adds 30 ms to each request. A tile has as many bytes as one of
2000 x 2000 px, 128 a shard, but decodes to 64 x 64 px, and networks are narrow: what is left is waiting. Training reads
blocks as its tasks do, one after the other; heatmaps and evaluation are the stages' own, in one process. Seconds are
measured with the delay and without: the difference is what it costs.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import boto3
import numpy as np
import pyarrow as pa
from measure import options, require, show
from moto.server import ThreadedMotoServer

from apacs_ray.config.settings import EvaluateSettings
from apacs_ray.data.images import encode_image, encode_mask
from apacs_ray.data.index_file import index_path
from apacs_ray.data.shard_rows import read_rows
from apacs_ray.data.shards import Receipt, TileIndex, read_index, shard_path, write_index, write_table, write_tiles
from apacs_ray.data.tile_rows import TILE_SCHEMA
from apacs_ray.distributed.evaluation import EvaluateTask, evaluate_tiles
from apacs_ray.distributed.heatmaps import ALL, HeatmapTask, write_heatmaps
from apacs_ray.distributed.starts import ValidationTiles, fit_starts, group_slides
from apacs_ray.distributed.tasks import PoolPlan
from apacs_ray.models.registry import MEMBERS
from apacs_ray.storage import Store, open_store
from apacs_ray.synthetic.slide import render, slide_specs
from apacs_ray.testing.alone import alone
from apacs_ray.testing.ensembles import random_networks, write_networks
from apacs_ray.testing.s3_proxy import Behavior, Proxy, proxy
from apacs_ray.training.augment import Augmentation
from apacs_ray.training.dataset import Heatmaps, TileDataset
from apacs_ray.training.sampler import schedule

ROWS, IMAGE, MASK = 128, 900_000, 20_000  # tiles a shard, bytes
SIDE, BLOCK = 64, 8  # px of the pictures; tiles that a task of training decodes at crop 1024
FINGERPRINT = "0" * 16
FOLDERS = {name: f"models/members/{name}" for name in MEMBERS} | {"fusion": "models/fusion"}


def main() -> None:
    """Write shards as of before and as of now, and read them as each stage does."""
    arguments = options(__doc__ or "", "two shards").parse_args()
    shards = 1 if arguments.smoke else 2 if arguments.quick else 4
    delay, image = (0.001, 9000) if arguments.smoke else (0.03, IMAGE)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with proxy(f"http://{host}:{port}") as between, alone():
        os.environ |= {**keys, "AWS_ENDPOINT_URL": between.url}
        boto3.client("s3").create_bucket(Bucket="tiles")
        show(f"{shards} shards of {ROWS} tiles", measure(between, shards, delay, image), arguments.json)
    server.stop()


def measure(between: Proxy, shards: int, delay: float, image: int) -> list[dict[str, Any]]:
    """Return a row for each way of reading."""
    before, now = open_store("s3://tiles/before"), open_store("s3://tiles/now")
    rgb, mask = render(slide_specs(0, SIDE, SIDE, train=1, test=0)[0])
    write_networks(now.child("models"), random_networks(rgb, width=0.02))
    picture = encode_image(rgb, "jpeg", 95, "4:4:4"), encode_mask(mask)
    receipts = [write(before, now, number, picture, image) for number in range(shards)]
    sha256 = write_index(now, "train", FINGERPRINT, receipts)
    committed = (index_path("train", FINGERPRINT), sha256)
    index = read_index(now, "train", committed=committed)
    tile = index.place(2)
    ways: dict[str, Callable[[], int]] = {
        "index: columns of shards, as before": lambda: len(read_index(before, "train")),
        "index: footers of shards": lambda: len(read_index(now, "train")),
        "index: one file": lambda: len(read_index(now, "train", committed=committed)),
        "a tile": lambda: len(list(read_rows(now, [(tile.path, tile.group, tile.row)], ["image", "mask"]))),
        "heatmaps": lambda: predict(now, index.paths),
        "the fusion's start": lambda: start(now, index),
        "an epoch of a member": lambda: epoch(now, index, None),
        "an epoch of the fusion": lambda: epoch(now, index, Heatmaps(MEMBERS, FINGERPRINT)),
        "evaluation": lambda: judge(now, index.paths),
    }
    rows = []
    for name, read in ways.items():
        seconds = {}
        for late in (0.0, delay):
            if name == "heatmaps":
                now.delete_folder("heatmaps")  # else they are found, and not written again
            between.behavior = Behavior(draw=lambda: "delay", delay=late)
            between.requests.clear()
            began = time.perf_counter()
            found = read()
            seconds[late] = time.perf_counter() - began
            require(found == (1 if name == "a tile" else shards * ROWS), f"{name}: {found} tiles")
        requests = len(between.requests)
        counts = {"requests": requests, "a_shard": requests / shards, "a_tile": requests / found}
        rows.append({"way": name, **counts, "s": seconds[delay], "s_without_delay": seconds[0.0]})
    return rows


def predict(store: Store, paths: tuple[str, ...]) -> int:
    """Write heatmaps as the stage does; return the tiles."""
    task = HeatmapTask(store, Heatmaps(MEMBERS, FINGERPRINT), {ALL: _members()}, None, 1, "float32", 1)
    return write_heatmaps(task, paths, PoolPlan(1, 1.0, 0.0), lambda done: None)[1]


def start(store: Store, index: TileIndex) -> int:
    """Fit where the fusion starts, as the stage of heatmaps does behind them; return the tiles."""
    tiles = ValidationTiles(store, Heatmaps(MEMBERS, FINGERPRINT), group_slides(index.slide_ids))
    found = fit_starts(tiles, index.paths)
    return len(index) if all(one.val_dice is not None for one in found.values()) else 0


def judge(store: Store, paths: tuple[str, ...]) -> int:
    """Evaluate as the stage does; return the tiles."""
    task = EvaluateTask(store, FOLDERS, EvaluateSettings(threads=1), "fcn8")
    return evaluate_tiles(task, paths, PoolPlan(1, 1.0, 0.0), lambda done: None).num_rows


def epoch(store: Store, index: TileIndex, heatmaps: Heatmaps | None) -> int:
    """Load an epoch in training order, a block after the other; return the tiles."""
    dataset = TileDataset(store, heatmaps, Augmentation(0, False, False))
    refs = list(schedule(index.groups(), 0, epochs=range(1), batch_size=4, rank=0, world=1, seed=0))
    wanted = [(ref, index.place(ref.row)) for ref in refs]
    return sum(len(dataset.load(wanted[start : start + BLOCK])) for start in range(0, len(wanted), BLOCK))


def _members() -> dict[str, str]:
    return {name: FOLDERS[name] for name in MEMBERS}


def write(before: Store, now: Store, number: int, picture: tuple[bytes, bytes], image: int) -> Receipt:
    """Write a shard without and with its part of the index; return its receipt."""
    generator = np.random.default_rng(number)
    values = {"string": f"slide {number}", "double": 0.25}
    columns: dict[str, Any] = {field.name: [values.get(str(field.type), 1)] * ROWS for field in TILE_SCHEMA}
    columns |= {name: [0] * ROWS for name in ("once_left", "once_top")}
    columns |= {name: [SIDE] * ROWS for name in ("once_right", "once_bottom", "width", "height")}
    columns["tile_id"] = [f"slide_{number:04d}_{row}" for row in range(ROWS)]
    columns["ignore"] = [None] * ROWS
    for name, content, size in zip(("image", "mask"), picture, (image, MASK), strict=True):
        columns[name] = [content + generator.bytes(max(0, size - len(content))) for _ in range(ROWS)]
    tiles = pa.table(columns, TILE_SCHEMA)
    receipt = Receipt(shard_path("tiles", "train", FINGERPRINT, number), ROWS, ROWS)
    write_table(before, tiles, receipt)
    return write_tiles(now, tiles, receipt)


if __name__ == "__main__":
    main()
