"""The feed of training alone: tiles a second a worker from shards to batches, without a network, by number of tasks.

Tiles of 2000 x 2000 px in shards, crops of 1024 px (the default), as a worker is fed: Ray Data's tasks read, decode and
augment, the worker makes batches of 4. Local, and from a store 30 ms away: the S3 reader of a run, whose client reads
files and answers each request 30 ms late, so that no server takes part of these cores. The first datasets warm up and
are not counted. CPU ms a tile are those of a task that does nothing else (`TileDataset.load`, by `process_time`): what
a core supplies at most, and what more cores would; those of the worker are of its own process.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyarrow as pa
from measure import options, require, show, start_ray
from tiles import write_tiles

from apacs_ray.data.shards import TileIndex, read_index
from apacs_ray.distributed.resource_plan import NetworkPlan
from apacs_ray.distributed.training_data import BLOCK_BYTES, ray_samples
from apacs_ray.runs.provenance import source_hash
from apacs_ray.storage import LocalStore
from apacs_ray.storage.s3 import ObjectFile
from apacs_ray.training.augment import Augmentation
from apacs_ray.training.batch import batches
from apacs_ray.training.dataset import TileDataset
from apacs_ray.training.sampler import SampleRef, schedule

BATCH, CORES = 4, 16  # tiles; cores that are reckoned with, beside a GPU
DEMAND = {"FCN-16 or FCN-8": 86, "FCN-32": 368}  # tiles/s of an H100 at crop 1024: README.md


@dataclass(frozen=True)
class LateClient:
    """Of boto3's client what reading asks for: ranges of a file, each `delay` s late."""

    delay: float

    def get_object(self, Bucket: str, Key: str, Range: str, IfMatch: str = "") -> dict[str, Any]:
        """Answer as S3 does."""
        time.sleep(self.delay)
        first, last = Range.removeprefix("bytes=").split("-")
        with Path(Bucket, Key).open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = int(first) if first else max(0, size - int(last))
            end = min(int(last) + 1, size) if first else size
            file.seek(start)
            content = file.read(end - start)
        head = {"ContentLength": len(content), "ContentRange": f"bytes {start}-{end - 1}/{size}", "ETag": '"1"'}
        return {**head, "Body": pa.BufferReader(content), "ResponseMetadata": {"HTTPStatusCode": 206}}


class LateStore(LocalStore):
    """A folder that is read as an S3 that answers late."""

    delay = 0.03

    def open(self, path: str) -> pa.NativeFile:
        """Open an object by the reader of S3."""
        return pa.PythonFile(ObjectFile(LateClient(self.delay), self.root, path, 300.0), mode="r")


def main() -> None:
    """Feed a worker in every way and print the table."""
    arguments = options(__doc__ or "", "half the tiles").parse_args()
    side, crop, shards, tiles, counted = 2000, 1024, 8, 16, 384
    if arguments.quick:
        counted = 192
    if arguments.smoke:
        side, crop, shards, tiles, counted = 96, 64, 2, 4, 8
    cores = os.cpu_count() or 1
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        index = _write(folder, side, shards, tiles)
        start_ray(max(2, cores))
        for name, store in {
            "local": LocalStore(folder),
            f"{1000 * LateStore.delay:g} ms away": LateStore(folder),
        }.items():
            dataset = TileDataset(store, None, Augmentation(crop, True, True))
            cpu = _cpu_seconds(dataset, index, min(counted, 48))
            for tasks in sorted({1, 2, cores}):
                speed, worker = _tiles_a_second(dataset, index, tasks, counted)
                row = {"store": name, "tasks": tasks, "tiles_per_s": speed, "worker_ms_a_tile": 1000 * worker}
                reckoned = {"CPU_ms_a_tile": 1000 * cpu, f"{CORES}_cores_at_most": CORES / cpu}
                demand = {f"cores_for_{who}": tiles_s * cpu for who, tiles_s in DEMAND.items()}
                rows.append({**row, **reckoned, **demand})
    show(f"the feed alone; tiles of {side} px, crops of {crop} px, {counted} tiles each", rows, arguments.json)


def _write(folder: str, side: int, shards: int, tiles: int) -> TileIndex:
    """Write one shard, and the same tiles as others under names of their own."""
    store = LocalStore(folder)
    write_tiles(store, side, {"train": tiles}, smear=2 * side)
    (entry,) = store.list("tiles")
    content = store.read(entry.path)
    for number in range(1, shards):
        store.write(entry.path.replace("-00000", f"-{number:05d}"), content)
    index = read_index(store, "train")
    require(len(index) == shards * tiles, f"{len(index)} tiles were written")
    return index


def _refs(index: TileIndex) -> Iterator[SampleRef]:
    return schedule(index.groups(), 0, epochs=range(1000), batch_size=BATCH, rank=0, world=1, seed=0)


def _cpu_seconds(dataset: TileDataset, index: TileIndex, count: int) -> float:
    """Seconds of CPU a tile in one process, in blocks as tasks have them."""
    wanted = [(ref, index.place(ref.row)) for ref in islice(_refs(index), 2 * count)]
    block = max(1, min(count, BLOCK_BYTES // max(1, 4 * dataset.augmentation.crop**2)))
    began = 0.0
    for start in range(0, 2 * count, block):
        if start >= count and not began:
            first, began = start, time.process_time()
        dataset.load(wanted[start : start + block])
    return (time.process_time() - began) / (2 * count - first)


def _tiles_a_second(dataset: TileDataset, index: TileIndex, tasks: int, count: int) -> tuple[float, float]:
    """Return tiles a second of wall time that reach a worker as batches, and the CPU seconds of its process a tile."""
    plan = NetworkPlan("fcn8", 1, float(tasks), 0.0, 1, tasks)
    samples = ray_samples(dataset, {"train": index}, islice(_refs(index), 2 * count), plan, source_hash())
    made, began, used, first = 0, 0.0, 0.0, 0
    for batch in batches(samples, BATCH):
        made += len(batch.inputs)
        if made >= count and not began:
            first, began, used = made, time.perf_counter(), time.process_time()
    require(made == 2 * count, f"{made} tiles came")
    counted = made - first
    return counted / (time.perf_counter() - began), (time.process_time() - used) / counted


if __name__ == "__main__":
    main()
