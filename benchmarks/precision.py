"""What bfloat16 costs in accuracy: the same trainings in both precisions, from the same seeds, on synthetic smears.

FCN-8 learns from tiles of a smear and is judged on others of it; the pooled validation Dice of the last epoch and of
the best, by seed, how far apart the two are, and means over the seeds.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from measure import options, require, show
from tiles import write_tiles

from apacs_ray.config.training_settings import TrainingSettings
from apacs_ray.data.shards import read_index
from apacs_ray.models.registry import build_member
from apacs_ray.storage import LocalStore
from apacs_ray.training.augment import Augmentation
from apacs_ray.training.dataset import TileDataset, in_memory
from apacs_ray.training.device import default_device
from apacs_ray.training.history import EpochRecord
from apacs_ray.training.loop import Trainer
from apacs_ray.training.sampler import schedule

SIDE, BATCH = 256, 2
TILES = {"train": 32, "val": 16}


def main() -> None:
    """Train in both precisions from each seed and print the table."""
    parser = options(__doc__, "one seed, 2 epochs")
    parser.add_argument("--width", type=float, default=0.25, help="of the network")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    arguments = parser.parse_args()
    seeds, epochs, width, side, tiles = arguments.seeds, arguments.epochs, arguments.width, SIDE, TILES
    if arguments.quick:
        seeds, epochs = 1, 2
    if arguments.smoke:
        seeds, epochs, width, side, tiles = 1, 2, 0.05, 64, {"train": 4, "val": 2}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        write_tiles(store, side, tiles, smear=8 * side)
        for seed in range(arguments.first, arguments.first + seeds):
            row: dict[str, float | int | str] = {"seed": seed}
            for precision in ("float32", "bfloat16"):
                settings = TrainingSettings(
                    epochs=epochs, batch_size=BATCH, learning_rate=1e-3, jitter=0, patience=0, precision=precision
                )
                history = _train(store, settings, seed, width)
                require([r.epoch for r in history] == list(range(epochs)), f"epochs of {precision}: {history}")
                require(history[-1].train_loss < history[0].train_loss, f"{precision} learns nothing: {history}")
                require(all(0 <= r.val_dice <= 1 for r in history), f"val Dice of {precision}: {history}")
                row |= {
                    f"{precision}_last": history[-1].val_dice,
                    f"{precision}_best": max(r.val_dice for r in history),
                }
            for which in ("last", "best"):
                row[f"difference_of_{which}"] = abs(float(row[f"bfloat16_{which}"]) - float(row[f"float32_{which}"]))
            rows.append(row)
            print(row, flush=True)
    mean = {key: statistics.mean(float(row[key]) for row in rows) for key in rows[0] if key != "seed"}
    show(
        f"val Dice of FCN-8, width {width:g}, {epochs} epochs",
        [*rows, {"seed": "mean", **mean}],
        arguments.json,
    )


def _train(store: LocalStore, settings: TrainingSettings, seed: int, width: float) -> tuple[EpochRecord, ...]:
    indices = {split: read_index(store, split) for split in ("train", "val")}
    sizes = indices["train"].groups(), len(indices["val"])
    refs = schedule(*sizes, epochs=range(settings.epochs), batch_size=BATCH, rank=0, world=1, seed=seed)
    torch.manual_seed(seed)
    trainer = Trainer(build_member("fcn8", width=width, dropout=0.1), settings, seed=seed, device=default_device())
    samples = in_memory(TileDataset(store, None, Augmentation(0, True, True)), indices, refs)
    return trainer.run(samples, len(indices["train"]) // BATCH, lambda record, state: None)


if __name__ == "__main__":
    main()
