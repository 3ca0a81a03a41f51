"""Requests and seconds of reading where the tiles of a split are, from an S3 that answers late: by shards, by one file.

The store is moto behind the proxy of the tests, which adds 30 ms to each request. Tiles are random bytes as large as
those of 2000 x 2000 px, 128 a shard.
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

from apacs_ray.data.index_file import index_path
from apacs_ray.data.shard_rows import read_rows
from apacs_ray.data.shards import Receipt, read_index, shard_path, write_index, write_table, write_tiles
from apacs_ray.data.tile_rows import TILE_SCHEMA
from apacs_ray.storage import Store, open_store
from apacs_ray.testing.s3_proxy import Behavior, Proxy, proxy

ROWS, IMAGE, MASK = 128, 900_000, 20_000  # tiles a shard, bytes
FINGERPRINT = "0" * 16


def main() -> None:
    """Write shards as of before and as of now, and read their index in each way."""
    arguments = options(__doc__ or "", "two shards").parse_args()
    shards = 1 if arguments.smoke else 2 if arguments.quick else 4
    delay, image = (0.0, 9000) if arguments.smoke else (0.03, IMAGE)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
    host, port = server.get_host_and_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    with proxy(f"http://{host}:{port}") as between:
        os.environ |= {**keys, "AWS_ENDPOINT_URL": between.url}
        boto3.client("s3").create_bucket(Bucket="tiles")
        show(f"{shards} shards of {ROWS} tiles", measure(between, shards, delay, image), arguments.json)
    server.stop()


def measure(between: Proxy, shards: int, delay: float, image: int) -> list[dict[str, Any]]:
    """Return a row for each way of reading."""
    before, now = open_store("s3://tiles/before"), open_store("s3://tiles/now")
    receipts = [write(before, now, number, image) for number in range(shards)]
    sha256 = write_index(now, "train", FINGERPRINT, receipts)
    committed = (index_path("train", FINGERPRINT), sha256)
    place = (receipts[0].path, 1, 0)
    ways: dict[str, Callable[[], Any]] = {
        "columns of shards, as before": lambda: read_index(before, "train"),
        "footers of shards": lambda: read_index(now, "train"),
        "one file": lambda: read_index(now, "train", committed=committed),
        "a tile": lambda: list(read_rows(now, [place], ["image", "mask"])),
    }
    rows = []
    for name, read in ways.items():
        between.behavior = Behavior(draw=lambda: "delay", delay=delay)
        between.requests.clear()
        began = time.perf_counter()
        found = len(read())
        seconds = time.perf_counter() - began
        require(found == (1 if name == "a tile" else shards * ROWS), f"{name}: {found} tiles")
        requests = len(between.requests)
        rows.append({"way": name, "requests": requests, "a_shard": requests / shards, "s": seconds})
    return rows


def write(before: Store, now: Store, number: int, image: int) -> Receipt:
    """Write a shard without and with its part of the index; return its receipt."""
    generator = np.random.default_rng(number)
    values = {"string": f"slide {number}", "double": 0.25}
    columns = {field.name: [values.get(str(field.type), 1)] * ROWS for field in TILE_SCHEMA}
    columns["tile_id"] = [f"slide_{number:04d}_{row}" for row in range(ROWS)]
    columns["image"] = [generator.bytes(image) for _ in range(ROWS)]
    columns["mask"] = [generator.bytes(MASK) for _ in range(ROWS)]
    tiles = pa.table(columns, TILE_SCHEMA)
    receipt = Receipt(shard_path("tiles", "train", FINGERPRINT, number), ROWS, ROWS)
    write_table(before, tiles, receipt)
    return write_tiles(now, tiles, receipt)


if __name__ == "__main__":
    main()
