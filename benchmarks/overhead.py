"""What Ray costs: images a second of a member's epoch through TorchTrainer and Ray Data, against the loop alone.

Both train the same full-width network on the same 512 x 512 tiles with the same trainer, threads and allocator. Ray:
as in a run, tiles read from Parquet shards and decoded by Ray Data's tasks on the same cores. Alone: one process, tiles
decoded beforehand. The first epoch of each warms up and is not counted; starts are not counted either.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from measure import Elsewhere, medians, options, require, show, start_ray
from tiles import write_tiles

from apacs_ray.config.training_settings import TrainingSettings
from apacs_ray.data.shards import read_index
from apacs_ray.distributed.resource_plan import Cluster, Nodes, cluster_of, plan_training
from apacs_ray.distributed.tasks import KEEP_MEMORY
from apacs_ray.distributed.train import train
from apacs_ray.distributed.worker import NetworkTask, TrainingTask
from apacs_ray.models.spec import ModelSpec
from apacs_ray.models.weights import build
from apacs_ray.runs.provenance import source_hash
from apacs_ray.storage import LocalStore, Store
from apacs_ray.training.augment import Augmentation
from apacs_ray.training.checkpoints import complete_checkpoints
from apacs_ray.training.dataset import TileDataset, in_memory
from apacs_ray.training.device import default_device
from apacs_ray.training.loop import Trainer
from apacs_ray.training.sampler import schedule

SIDE, BATCH = 512, 2
AUGMENTATION = Augmentation(0, True, True)


def main() -> None:
    """Measure an epoch of each network with and without Ray and print the table."""
    parser = options(__doc__, "a quarter of the width, 2 repetitions")
    parser.add_argument("--members", help="networks to measure (default: fcn32,fcn8)")
    parser.add_argument("--tiles", type=int, help="tiles of an epoch (default: 16)")
    arguments = parser.parse_args()
    side, tiles, width, repetitions, members = SIDE, 16, 1.0, 5, "fcn32,fcn8"
    if arguments.quick:
        width, repetitions = 0.25, 2
    if arguments.smoke:
        side, tiles, width, repetitions, members = 64, 4, 0.05, 1, "fcn8"
    tiles = arguments.tiles or tiles
    start_ray()
    import ray

    resources = ray.cluster_resources()
    cluster = cluster_of([Nodes(resources["CPU"], resources.get("GPU", 0.0), 1)], [])
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_tiles(LocalStore(folder), side, {"train": tiles, "val": 1})
        for name in (arguments.members or members).split(","):
            settings = TrainingSettings(epochs=2, batch_size=BATCH, dice_weight=0, jitter=0, patience=0)
            task = _task(LocalStore(folder), name, width, settings, cluster)
            alone = Elsewhere(partial(_alone, task), KEEP_MEMORY["env_vars"])
            seconds: dict[str, list[float]] = {"alone": [], "Ray": []}
            for repetition in range(repetitions):
                seconds["alone"].append(float(alone()))  # type: ignore[arg-type]
                seconds["Ray"].append(_with_ray(task, f"state/{name}-{repetition}"))
            alone.end()
            middle = medians(seconds)
            require(all(value > 0 for value in middle.values()), f"an epoch took no time: {seconds}")
            speeds = {f"{way}_images_per_s": tiles / value for way, value in middle.items()}
            rows.append({"network": name, **speeds, "ratio": middle["alone"] / middle["Ray"], "seconds": seconds})
    show(f"an epoch of {tiles} tiles of {side} px, {task.plan.describe()}", rows, arguments.json)


def _task(store: Store, name: str, width: float, settings: TrainingSettings, cluster: Cluster) -> TrainingTask:
    network = NetworkTask(name, ModelSpec("member", name, width=width), settings, "state", name)
    indices = {split: read_index(store, split) for split in ("train", "val")}
    (plan,) = plan_training([name], cluster, batch_size=BATCH).networks
    return TrainingTask((network,), TileDataset(store, None, AUGMENTATION), indices, plan, 0, 0, source_hash(), 600.0)


def _with_ray(task: TrainingTask, state: str) -> float:
    """Return the seconds of the second epoch of a run on Ray."""
    (network,) = task.networks
    fresh = replace(task, networks=(replace(network, state=state),))
    train([fresh], parallel=True, on_progress=lambda name, now: None)
    seconds = complete_checkpoints(task.store, state)[-1].state["history"][1]["seconds"]
    task.store.delete_folder(state)
    return float(seconds)


def _alone(task: TrainingTask) -> Any:
    """Set up the same epochs without Ray, from decoded tiles."""
    torch.set_num_threads(task.plan.threads)
    (network,) = task.networks
    sizes = task.indices["train"].groups(), len(task.indices["val"])

    def work() -> float:
        torch.manual_seed(0)
        trainer = Trainer(build(network.spec), network.settings, seed=0, device=default_device())
        refs = list(schedule(*sizes, epochs=range(2), batch_size=BATCH, rank=0, world=1, seed=0))
        samples = list(in_memory(task.dataset, task.indices, refs))
        history = trainer.run(iter(samples), len(task.indices["train"]) // BATCH, lambda record, state: None)
        return history[1].seconds

    return work


if __name__ == "__main__":
    main()
