"""Seconds of a sweep with the members' heatmaps stored once, against running the members in every trial and epoch.

Both ways do the same work on the same tiles in this process, alternating: (a) a fusion epoch that reads stored
heatmaps, (b) the same epoch with the three members run on every tile, in float32 as everywhere in a run, and (c)
storing the heatmaps once.
A sweep of 20 trials of E epochs costs (c) + 20 E (a), or 20 E (b).
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pyarrow as pa
import torch
from measure import alternate, medians, options, require, show
from tiles import FINGERPRINT, write_tiles

from apacs_ray.config.training_settings import FusionSettings
from apacs_ray.data.shards import Receipt, read_index, write_table
from apacs_ray.distributed.heatmaps import HEATMAP_SCHEMA
from apacs_ray.inference.predictor import Predictor
from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.registry import MEMBERS, build_member
from apacs_ray.models.spec import fusion_spec
from apacs_ray.models.weights import build
from apacs_ray.storage import LocalStore, Store
from apacs_ray.training.augment import Augmentation
from apacs_ray.training.batch import Sample
from apacs_ray.training.dataset import Heatmaps, TileDataset, decode_pixels, encode_heatmaps, one_by_one
from apacs_ray.training.loop import Trainer
from apacs_ray.training.sampler import schedule

TRIALS, EPOCHS = 20, 12


def main() -> None:
    """Measure epochs with stored and with live heatmaps and print the table."""
    parser = options(__doc__ or "", "fewer tiles and repetitions")
    parser.add_argument("--width", type=float, default=0.25, help="width of all networks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    side, tiles, width, repetitions = 256, 20, arguments.width, 5
    if arguments.quick:
        tiles, repetitions = 8, 2
    if arguments.smoke:
        side, tiles, width, repetitions = 64, 8, 0.05, 1
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        write_tiles(store, side, {"train": tiles * 3 // 4, "val": tiles // 4}, smear=5 * side)
        torch.manual_seed(0)
        predictor = Predictor(
            Ensemble({name: build_member(name, width=width) for name in MEMBERS}, {}), threads=1, precision="float32"
        )
        _store_heatmaps(store, predictor)
        # no augmentation: a network on a turned tile does not give the turned heatmap
        losses = [_epoch(store, width, side, members, augmented=False) for members in (None, predictor)]
        require(losses[0] == losses[1], f"stored heatmaps train otherwise than the members: losses {losses}")
        ways = {
            "store_once": lambda: _store_heatmaps(store, predictor),
            "epoch_cached": lambda: _epoch(store, width, side, None),
            "epoch_live": lambda: _epoch(store, width, side, predictor),
        }
        seconds = medians(alternate(ways, repetitions, warm=False))
    cached = seconds["store_once"] + TRIALS * EPOCHS * seconds["epoch_cached"]
    live = TRIALS * EPOCHS * seconds["epoch_live"]
    row = {f"{name}_s": value for name, value in seconds.items()}
    row |= {"sweep_cached_s": cached, "sweep_live_s": live, "ratio": live / cached}
    title = f"a sweep of {TRIALS} trials of {EPOCHS} epochs, {tiles} tiles of {side} px, width {width:g}"
    show(title, [row], arguments.json)


def _store_heatmaps(store: Store, predictor: Predictor) -> None:
    for split in ("train", "val"):
        index = read_index(store, split)
        dataset = TileDataset(store, None, Augmentation(0, False, False))
        rows = []
        for number in range(len(index)):
            place = index.place(number)
            rgb, _ = dataset.decode(place)
            rows.append({"tile_id": place.tile_id, "heatmaps": encode_heatmaps(predictor.probabilities(rgb))})
        path = Heatmaps(MEMBERS, FINGERPRINT).path(index.paths[0])
        write_table(store, pa.Table.from_pylist(rows, HEATMAP_SCHEMA), Receipt(path, len(rows), len(rows)))


def _epoch(store: Store, width: float, side: int, live: Predictor | None, *, augmented: bool = True) -> float:
    """Train one epoch of a trial.

    Args:
        store: The tiles and heatmaps.
        width: Of the network.
        side: Of a crop, px.
        live: Runs the members on each tile, whose stored heatmaps are then replaced; None uses the stored ones.
        augmented: Augment with flips and quarter turns.

    Returns:
        The training loss.
    """
    settings = FusionSettings(crop=side, batch_size=4, epochs=1)
    indices = {split: read_index(store, split) for split in ("train", "val")}
    dataset = TileDataset(store, Heatmaps(settings.members, FINGERPRINT), Augmentation(side, augmented, augmented))
    refs = schedule(
        indices["train"].groups(), len(indices["val"]), epochs=range(1), batch_size=4, rank=0, world=1, seed=0
    )
    samples = one_by_one(dataset, indices, refs)
    if live is not None:
        samples = (_through_members(sample, live) for sample in samples)
    torch.manual_seed(0)
    trainer = Trainer(build(fusion_spec(settings, width)), settings, seed=0, device=torch.device("cpu"))
    (record,) = trainer.run(samples, -(-len(indices["train"]) // 4), lambda record, state: None)
    return record.train_loss


def _through_members(sample: Sample, live: Predictor) -> Sample:
    probabilities = live.probabilities(sample.inputs[:, :, -3:])
    heatmaps = decode_pixels(encode_heatmaps(probabilities))
    return replace(sample, inputs=np.concatenate([heatmaps, sample.inputs[:, :, -3:]], axis=2))


if __name__ == "__main__":
    main()
