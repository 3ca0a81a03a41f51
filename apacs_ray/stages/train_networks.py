"""What training the members and training the fusion share: tasks, progress, and keeping the best weights."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from apacs_ray.config.training_settings import MembersSettings, TrainingSettings
from apacs_ray.console import say
from apacs_ray.data.shards import TileIndex
from apacs_ray.distributed.resource_plan import NetworkPlan, plan_training
from apacs_ray.distributed.train import read_progress, train
from apacs_ray.distributed.worker import NetworkTask, TrainingTask
from apacs_ray.errors import ApacsError
from apacs_ray.models.spec import ModelSpec
from apacs_ray.models.weights import build, weights_bytes
from apacs_ray.runs.provenance import source_hash
from apacs_ray.stages.ingest_result import read_committed_index
from apacs_ray.stages.stage import Job, StageResult
from apacs_ray.storage import Store
from apacs_ray.training.augment import Augmentation
from apacs_ray.training.checkpoints import best_checkpoint, best_weights, complete_checkpoints
from apacs_ray.training.dataset import Heatmaps, TileDataset
from apacs_ray.training.history import EpochRecord, history_csv, read_history, score, start_record
from apacs_ray.training.tensorboard import write_curves

PRETRAINED = "pretrained.safetensors"
WEIGHTS, SPEC, HISTORY = KEPT = ("model.safetensors", "model.json", "history.csv")  # of each network, in its folder


@dataclass(frozen=True)
class Network:
    """A network to train.

    Attributes:
        name: Its key.
        spec: What it is.
        folder: Of its model in the run.
        settings: How it is trained.
        heatmaps: What it learns from beside RGB.
        indices: The tiles it learns from, by split; None: all that are there.
        pretrained: Gives the safetensors to begin with; None from it: as the network is built.
    """

    name: str
    spec: ModelSpec
    folder: str
    settings: TrainingSettings
    heatmaps: Heatmaps | None = None
    indices: dict[str, TileIndex] | None = None
    pretrained: Callable[[], bytes | None] = lambda: None


@dataclass(frozen=True)
class TrainedNetwork:
    """A network whose best weights are kept.

    Attributes:
        folder: Of its model in the run.
        sha256: Of `model.safetensors`.
        epoch: Of these weights, from 0; -1: those that training started from were better than every epoch's.
        epochs: That were trained.
        val_dice: Of these weights, in 0..1; None where it is not defined.
        device: On which it was trained.
    """

    folder: str
    sha256: str
    epoch: int
    epochs: int
    val_dice: float | None
    device: str | None


@dataclass(frozen=True)
class TrainingResult(StageResult):
    """Networks by name."""

    networks: dict[str, TrainedNetwork]

    @property
    def weights(self) -> dict[str, str]:
        """The hash of each network's weights, for fingerprints of what uses them."""
        return {name: network.sha256 for name, network in self.networks.items()}


def weights_hold(store: Store, result: TrainingResult) -> bool:
    """Return whether the weights that a stage committed are still there, of a local run by their hash.

    What an object store has written stays as it is, and is read by everybody who uses it: there it is only looked up.
    """
    for network in result.networks.values():
        path = f"{network.folder}/model.safetensors"
        if store.version(path) is None:
            return False
        if store.is_local and hashlib.sha256(store.read(path)).hexdigest() != network.sha256:
            return False
    return True


def read_indices(store: Store, splits: Sequence[str] = ("train", "val")) -> dict[str, TileIndex]:
    """Read the indices of annotated tiles, by default of those to learn from.

    Returns:
        Those of `splits`.

    Raises:
        ApacsError: when one of them is empty.
    """
    indices = {split: read_committed_index(store, split) for split in splits}
    for split, index in indices.items():
        if not len(index):
            place = "rejects/ and data.val_fraction" if split == "val" else "rejects/"
            raise ApacsError(f"{store.uri}: no annotated {split} tile is left; look at {place}")
        if not index.mask_fraction.any():
            effect = {"train": "nothing can be learned", "val": "epochs are told apart by their loss alone"}
            say(f"no {split} tile holds a cell: {effect.get(split, 'Dice is not defined')}")
    return indices


def train_networks(
    job: Job, networks: Sequence[Network], fingerprint: str, training_data: str, mpp: float | None = None
) -> dict[str, TrainedNetwork]:
    """Train networks and leave `KEPT` of each in its folder, and its curves.

    Training state lies in `<folder>/.state-<fingerprint>` until the stage commits.

    Args:
        job: What the stage works with.
        networks: In the order in which they are planned.
        fingerprint: Of the stage.
        training_data: Fingerprint of the tiles, for `model.json`.
        mpp: um per px of the tiles, likewise.

    Returns:
        What became of each, by name.
    """
    store = job.store
    indices = read_indices(store)
    waiting = [network for network in networks if not is_trained(store, network, fingerprint)]
    if waiting:
        job.ray.start()
        first = waiting[0].settings
        plan = plan_training(
            [network.name for network in waiting],
            job.ray.cluster(),
            workers=first.workers,
            batch_size=first.batch_size,
            mode=first.mode if isinstance(first, MembersSettings) else "parallel",
        )
        say(plan.describe())
        tasks = [
            _task(job, group, resources, indices, fingerprint, training_data) for group, resources in plan.runs(waiting)
        ]
        tiles = {network.name: sum(map(len, (network.indices or indices).values())) for network in waiting}
        with job.progress() as progress:
            train(
                tasks,
                parallel=plan.mode == "parallel",
                on_progress=lambda name, now: progress.show(
                    name,
                    now["epoch"],
                    now["epochs"],
                    f"val Dice {now['val_dice']:.4f}",
                    rows=now["epoch"] * tiles[name],
                ),
            )
        seed = job.settings.run.seed
        for network in waiting:
            keep_best(store, network, replace(network.spec, training_data=training_data, mpp=mpp), fingerprint, seed)
    for network in networks:  # also of those that were trained before: other settings may have drawn theirs since
        write_curves(store, network.folder, read_history(store.read(f"{network.folder}/{HISTORY}").decode()))
    return {network.name: _trained(store, network, fingerprint) for network in networks}


def _task(
    job: Job,
    group: Sequence[Network],
    resources: NetworkPlan,
    indices: dict[str, TileIndex],
    fingerprint: str,
    training_data: str,
) -> TrainingTask:
    """One run of Ray Train for networks that see the same samples."""
    store, run = job.store, job.settings.run
    how = group[0].settings
    networks = []
    for network in group:
        state = state_folder(network, fingerprint)
        pretrained = write_pretrained(store, f"{state}/{PRETRAINED}", network.pretrained)
        spec = replace(network.spec, training_data=training_data)
        networks.append(NetworkTask(network.name, spec, network.settings, state, network.folder, pretrained))
    return TrainingTask(
        tuple(networks),
        TileDataset(store, group[0].heatmaps, Augmentation(how.crop, how.flips, how.turns)),
        group[0].indices or indices,
        resources,
        run.seed,
        run.max_failures,
        source_hash(),
        60 * run.checkpoint_minutes,
        deterministic=run.deterministic,
        compiled=run.compile,
    )


def write_pretrained(store: Store, path: str, pretrained: Callable[[], bytes | None]) -> str | None:
    """Put the weights that training starts from where its workers find them, unless they are there already.

    Returns:
        Their path; None where it starts from none.
    """
    if store.version(path) is None:
        weights = pretrained()
        if weights is None:
            return None
        store.write(path, weights)
    return path


def state_folder(network: Network, fingerprint: str) -> str:
    """Where a network's training state lies until its stage commits."""
    return f"{network.folder}/.state-{fingerprint[:8]}"


def forget_state(store: Store, folders: Sequence[str]) -> None:
    """Delete training state below `folders`, of this training and of earlier ones that were given up."""
    for folder in folders:
        tops = {entry.path.removeprefix(f"{folder}/").split("/")[0] for entry in store.list(folder)}
        for top in tops:
            if top.startswith(".done-"):
                store.delete(f"{folder}/{top}")
            elif top.startswith(".state-"):
                store.delete_folder(f"{folder}/{top}")


def keep_best(store: Store, network: Network, spec: ModelSpec, fingerprint: str, seed: int) -> None:
    """Copy the best weights to the network's folder, of a checkpoint or those it started from, and its history.

    Args:
        store: The run.
        network: That was trained.
        spec: What `model.json` is to say of it, but for its metrics.
        fingerprint: Of the stage.
        seed: With which it was built.

    Raises:
        ApacsError: No epoch has left weights that are whole.
    """
    checkpoints = complete_checkpoints(store, state_folder(network, fingerprint))
    select = network.settings.select
    best_and_weights = best_weights(store, checkpoints, select)
    if best_and_weights is None:
        raise ApacsError(f"{network.name}: training ended without a checkpoint that is whole")
    best, weights = best_and_weights
    if best != best_checkpoint(checkpoints, select):
        say(f"{network.name}: the best weights are damaged in the store; those of epoch {best.epoch} are taken")
    history = tuple(EpochRecord(**record) for record in checkpoints[-1].state["history"])
    kept_record = best.record
    start = start_record(network.spec.start, network.settings.dice_weight)
    if start is not None:
        history = (start, *history)
        if score(start, select) > score(kept_record, select):
            say(f"{network.name}: no epoch is better on validation than the start (val Dice {start.val_dice:.4f})")
            torch.manual_seed(seed)
            kept_record, weights = start, weights_bytes(build(spec))
    if select == "dice" and not score(kept_record)[0]:
        say(
            f"{network.name}: no epoch has a val Dice above 0 (do the val tiles hold cells?); the weights of epoch "
            f"{kept_record.epoch}, of the lowest val loss, are kept"
        )
    val_dice = None if math.isnan(kept_record.val_dice) else kept_record.val_dice
    metrics = {"epoch": kept_record.epoch, "epochs": history[-1].epoch + 1, "val_dice": val_dice}
    kept = {WEIGHTS: weights, SPEC: replace(spec, metrics=metrics).to_json(), HISTORY: history_csv(history).encode()}
    for name, content in kept.items():
        store.write(f"{network.folder}/{name}", content)
    # settings that are tried in turn train to the same folder: a mark names the files that it is of. Weights alone
    # would not do: those of two settings may be equal, as where one of them allows more epochs
    store.write(done_mark(network, fingerprint), encode_mark(kept))


def done_mark(network: Network, fingerprint: str) -> str:
    """Return the path of the file that says, by hashes, what was trained under a fingerprint."""
    return f"{network.folder}/.done-{fingerprint[:8]}"


def encode_mark(kept: Mapping[str, bytes]) -> bytes:
    """Return a done mark as JSON: the hash of each of the files `KEPT`."""
    return json.dumps({name: hashlib.sha256(content).hexdigest() for name, content in kept.items()}).encode()


def is_trained(store: Store, network: Network, fingerprint: str) -> bool:
    """Tell whether the network was trained under this fingerprint, and what that left is still in its folder."""
    try:
        mark = store.read(done_mark(network, fingerprint))
        return mark == encode_mark({name: store.read(f"{network.folder}/{name}") for name in KEPT})
    except FileNotFoundError:
        return False


def _trained(store: Store, network: Network, fingerprint: str) -> TrainedNetwork:
    """What became of a network that `is_trained`: its mark has the hash of its weights."""
    metrics = ModelSpec.from_json(store.read(f"{network.folder}/{SPEC}")).metrics
    progress = read_progress(store, state_folder(network, fingerprint)) or {}
    return TrainedNetwork(
        network.folder,
        json.loads(store.read(done_mark(network, fingerprint)))[WEIGHTS],
        int(metrics["epoch"] or 0),
        int(metrics["epochs"] or 0),
        metrics["val_dice"],
        progress.get("device"),
    )
