"""What a sweep costs with the members' heatmaps stored once, against running the members in every trial and epoch.

Both ways do the same work on the same tiles in this process, alternating: (a) a fusion epoch that reads stored
heatmaps, (b) the same epoch with the three members run on every tile, in float32 as everywhere in a run, and (c)
storing the heatmaps once.
A sweep of 20 trials of E epochs costs (c) + 20 E (a), or 20 E (b).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import torch
from tiles import MARK, write_tiles

from apacs_ray.adapters.heatmaps import HEATMAP_SCHEMA
from apacs_ray.data.shards import Receipt, read_index, write_table
from apacs_ray.inference import Predictor
from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.fcn import build_member
from apacs_ray.models.spec import MEMBERS, fusion_spec
from apacs_ray.models.weights import build
from apacs_ray.settings import FusionSettings
from apacs_ray.storage import LocalStore, Store
from apacs_ray.training.config import TrainConfig
from apacs_ray.training.feed import Crop, Feed, Heatmaps, decode_pixels, encode_heatmaps, one_by_one
from apacs_ray.training.loop import Trainer
from apacs_ray.training.order import schedule

TRIALS, EPOCHS = 20, 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer tiles and repetitions")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--width", type=float, default=0.25, help="width of all networks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    repetitions = 2 if arguments.quick else 5
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        count = 8 if arguments.quick else 20
        write_tiles(store, 256, {"train": count * 3 // 4, "val": count // 4}, smear=1280)
        predictor = Predictor(
            Ensemble({name: build_member(name, width=arguments.width) for name in MEMBERS}, {}),
            threads=1,
            precision="float32",
        )
        stored, cached, live = [], [], []
        for _ in range(repetitions):
            stored.append(_timed(lambda: _store_heatmaps(store, predictor)))
            cached.append(_timed(lambda: _epoch(store, arguments.width, None)))
            live.append(_timed(lambda: _epoch(store, arguments.width, predictor)))
    once, with_cache, without = (statistics.median(times) for times in (stored, cached, live))
    figures = {
        "store_once_s": once,
        "epoch_cached_s": with_cache,
        "epoch_live_s": without,
        "sweep_cached_s": once + TRIALS * EPOCHS * with_cache,
        "sweep_live_s": TRIALS * EPOCHS * without,
        "width": arguments.width,
        "repetitions": repetitions,
    }
    figures["ratio"] = figures["sweep_live_s"] / figures["sweep_cached_s"]
    for name, value in figures.items():
        print(f"{name:>16}  {value:.3f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def _store_heatmaps(store: Store, predictor: Predictor) -> None:
    for split in ("train", "val"):
        index = read_index(store, split)
        feed = Feed(store, None, Crop(0, False, False))
        rows = []
        for number in range(len(index)):
            place = index.place(number)
            rgb, _ = feed.decode(place)
            rows.append({"tile_id": place.tile_id, "heatmaps": encode_heatmaps(predictor.probabilities(rgb))})
        path = Heatmaps(MEMBERS, MARK).path(index.paths[0])
        write_table(store, pa.Table.from_pylist(rows, HEATMAP_SCHEMA), Receipt(path, len(rows), len(rows)))


def _epoch(store: Store, width: float, live: Predictor | None) -> None:
    """One epoch of a trial; with `live` the members run on each tile before its stored heatmaps are replaced."""
    settings = FusionSettings(crop=256, batch_size=4)
    config = replace(TrainConfig.of(settings, 0, epochs=1), precision="auto")
    indices = {split: read_index(store, split) for split in ("train", "val")}
    feed = Feed(store, Heatmaps(settings.members, MARK), Crop(256, True, True))
    refs = schedule(
        indices["train"].groups(), len(indices["val"]), epochs=range(1), batch_size=4, rank=0, world=1, seed=0
    )
    samples = one_by_one(feed, indices, refs)
    if live is not None:
        samples = (_through_members(sample, live) for sample in samples)
    trainer = Trainer(build(fusion_spec(settings, width)), config, device=torch.device("cpu"))
    trainer.run(samples, -(-len(indices["train"]) // 4), lambda record, state: None)


def _through_members(sample, live: Predictor):
    probabilities = live.probabilities(sample.inputs[:, :, -3:])
    heatmaps = decode_pixels(encode_heatmaps(probabilities))
    return replace(sample, inputs=np.concatenate([heatmaps, sample.inputs[:, :, -3:]], axis=2))


def _timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
