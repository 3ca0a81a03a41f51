"""What training the members and training the fusion share: tasks, progress, and keeping the best weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from apacs_ray.config.settings import MembersSettings, TrainingSettings
from apacs_ray.console import say
from apacs_ray.data.shards import TileIndex, read_index
from apacs_ray.distributed.resource_plan import NetworkPlan, plan_training
from apacs_ray.distributed.train import NetworkTask, TrainingTask, read_progress, train
from apacs_ray.errors import ApacsError
from apacs_ray.models.spec import ModelSpec
from apacs_ray.runs.provenance import source_hash
from apacs_ray.stages.pipeline import Context
from apacs_ray.storage import Store
from apacs_ray.training.checkpoints import best_checkpoint, best_weights, complete_checkpoints
from apacs_ray.training.config import TrainConfig
from apacs_ray.training.dataset import Crop, Feed, Heatmaps
from apacs_ray.training.history import EpochRecord, history_csv

START = "start.safetensors"


@dataclass(frozen=True)
class Network:
    """A network to train: its key, what it is, the folder of its model in the run, and what it learns from."""

    name: str
    spec: ModelSpec
    folder: str
    settings: TrainingSettings
    heatmaps: Heatmaps | None = None
    indices: dict[str, TileIndex] | None = None
    start: Callable[[], bytes | None] = lambda: None  # safetensors to begin with; None: as the network is built


def read_indices(store: Store) -> dict[str, TileIndex]:
    """The indices of the train and val tiles. Raises ApacsError when one of them is empty."""
    indices = {split: read_index(store, split) for split in ("train", "val")}
    for split, index in indices.items():
        if not len(index):
            raise ApacsError(
                f"{store.uri}: no {split} tile is left to learn from; look at rejects/ and data.val_fraction"
            )
    return indices


def train_networks(context: Context, networks: Sequence[Network], mark: str) -> dict[str, dict[str, Any]]:
    """Train networks and leave `model.safetensors`, `model.json` and `history.csv` of each in its folder.

    Returns facts of each by name. Training state lies in `<folder>/.state-<mark>` until the stage commits.
    """
    run = context.run
    indices = read_indices(run.store)
    waiting = [network for network in networks if run.store.version(f"{network.folder}/.done-{mark[:8]}") is None]
    if waiting:
        context.ray.start()
        first = waiting[0].settings
        plan = plan_training(
            [network.name for network in waiting],
            context.ray.cluster(),
            workers=first.workers,
            batch_size=first.batch_size,
            mode=first.mode if isinstance(first, MembersSettings) else "parallel",
        )
        say(plan.describe())
        tasks = [_task(context, group, resources, indices, mark) for group, resources in plan.runs(waiting)]
        tiles = {network.name: sum(map(len, (network.indices or indices).values())) for network in waiting}
        with context.bars() as shown:
            train(
                tasks,
                parallel=plan.mode == "parallel",
                on_progress=lambda name, now: shown.show(
                    name,
                    now["epoch"],
                    now["epochs"],
                    f"val Dice {now['val_dice']:.4f}",
                    rows=now["epoch"] * tiles[name],
                ),
            )
        for network in waiting:
            _keep_best(run.store, network, _spec(context, network), mark)
            progress = read_progress(run.store, state_folder(network, mark)) or {}
            run.facts["device"] = {**run.facts.get("device", {}), network.name: progress.get("device")}
    return {network.name: _facts(run.store, network) for network in networks}


def _spec(context: Context, network: Network) -> ModelSpec:
    return replace(network.spec, training_data=context.done("ingest").fingerprint)


def _task(
    context: Context, group: Sequence[Network], resources: NetworkPlan, indices: dict[str, TileIndex], mark: str
) -> TrainingTask:
    """One run of Ray Train for networks that see the same samples."""
    store, seed = context.run.store, context.settings.run.seed
    how = group[0].settings
    networks = []
    for network in group:
        state = state_folder(network, mark)
        start = _write_start(store, f"{state}/{START}", network)
        config = TrainConfig.of(network.settings, seed)
        networks.append(NetworkTask(network.name, _spec(context, network), config, state, network.folder, start))
    return TrainingTask(
        tuple(networks),
        Feed(store, group[0].heatmaps, Crop(how.crop, how.flips, how.turns)),
        group[0].indices or indices,
        resources,
        context.settings.run.max_failures,
        source_hash(),
    )


def _write_start(store: Store, path: str, network: Network) -> str | None:
    """Put the weights that training starts from where its workers find them."""
    if store.version(path) is None:
        weights = network.start()
        if weights is None:
            return None
        store.write(path, weights)
    return path


def state_folder(network: Network, mark: str) -> str:
    """Where a network's training state lies until its stage commits."""
    return f"{network.folder}/.state-{mark[:8]}"


def forget_state(store: Store, networks: Sequence[Network], mark: str) -> None:
    """Delete training state, of this training and of earlier ones that were given up."""
    for network in networks:
        for entry in list(store.list(network.folder)):
            top = entry.path.removeprefix(f"{network.folder}/").split("/")[0]
            if top.startswith(".done-") or top.startswith(".state-"):
                store.delete(entry.path)
        store.delete_folder(state_folder(network, mark))


def _keep_best(store: Store, network: Network, spec: ModelSpec, mark: str) -> None:
    checkpoints = complete_checkpoints(store, state_folder(network, mark))
    found = best_weights(store, checkpoints)
    if found is None:
        raise ApacsError(f"{network.name}: training ended without a checkpoint that is whole")
    best, weights = found
    if best != best_checkpoint(checkpoints):
        say(f"{network.name}: the best weights are damaged in the store; those of epoch {best.epoch} are taken")
    history = tuple(EpochRecord(**record) for record in checkpoints[-1].state["history"])
    metrics = {"epoch": best.epoch, "epochs": len(history), "val_dice": best.record.val_dice}
    store.write(f"{network.folder}/model.safetensors", weights)
    store.write(f"{network.folder}/model.json", replace(spec, metrics=metrics).to_json())
    store.write(f"{network.folder}/history.csv", history_csv(history).encode())
    store.write(f"{network.folder}/.done-{mark[:8]}", b"")


def _facts(store: Store, network: Network) -> dict[str, Any]:
    weights = store.read(f"{network.folder}/model.safetensors")
    spec = ModelSpec.from_json(store.read(f"{network.folder}/model.json"))
    return {"sha256": hashlib.sha256(weights).hexdigest(), **spec.metrics}
