"""Training checkpoints of one network in a run: keeping them, which are complete, which is the newest, the best.

Every attempt (a start of the same training) has its folder `attempt-N` with `epoch_NNNNN` checkpoints in it, written
at the end of an epoch, or `epoch_NNNNN_step_NNNNN`, written in the middle when its node was to be taken away. A
checkpoint counts when its files are there with the sizes that `state.json` gives; hashes are checked when it is
loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apacs_ray.config.training_settings import Select
from apacs_ray.storage import SMALL, Store
from apacs_ray.training.history import EpochRecord, score

STATE = "state.json"
MODEL = "model.safetensors"
FILES = (MODEL, "optimizer.safetensors")  # and never what a `state.json` may name beside them
TIMEOUT = 600.0  # s that a store in trouble gets to recover
_EPOCH = re.compile(r".*/attempt-\d+/epoch_\d+(_step_\d+)?(?=/)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder in the store, and its `state.json`."""

    path: str
    state: dict[str, Any]

    @property
    def epoch(self) -> int:
        """The epoch, from 0, at whose end or in which it was written."""
        return int(self.state["epoch"])

    @property
    def whole(self) -> bool:
        """Whether it was written at the end of its epoch."""
        return self.state.get("part") is None

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and step with which training goes on from here."""
        return (self.epoch + 1, 0) if self.whole else (self.epoch, int(self.state["part"]["steps"]))

    @property
    def record(self) -> EpochRecord:
        """This epoch, the last of the history; of a whole one only."""
        return EpochRecord(**self.state["history"][-1])


def complete_checkpoints(store: Store, folder: str) -> list[Checkpoint]:
    """Return every complete checkpoint below `folder`, the one that is furthest last."""
    sizes = {entry.path: entry.size for entry in store.list(folder)}
    found = []
    for path in sizes:
        if path.endswith(f"/{STATE}") and "/attempt-" in f"/{path}":
            checkpoint = _read(store, path.removesuffix(f"/{STATE}"), sizes)
            if checkpoint is not None:
                found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: (*checkpoint.place, checkpoint.path))


def keep_checkpoint(store: Store, folder: str, attempt: int, local: Path, select: Select = "dice") -> None:
    """Put the checkpoint in a local folder into the run, and delete all others but the best there.

    Those of a later attempt stay: this worker may be of an attempt that was given up.

    `state.json` goes last. A store that is in trouble is given `TIMEOUT` seconds to recover: what is trained is not
    lost for that.

    Args:
        store: The run.
        folder: Of the network's training state in it.
        attempt: Number of this start of the training.
        local: Folder of the checkpoint on this machine.
        select: What makes an epoch the best.
    """
    state = json.loads((local / STATE).read_text())
    part = f"_step_{state['part']['steps']:05d}" if state["part"] else ""
    path = f"{folder}/attempt-{attempt}/epoch_{state['epoch']:05d}{part}"
    store = store.with_timeout(TIMEOUT)
    for name in (*FILES, STATE):
        store.upload(f"{path}/{name}", local / name)
    best = best_checkpoint(complete_checkpoints(store, folder), select)
    kept = {path} | ({best.path} if best else set())
    epochs = {match[0] for entry in store.list(folder) if (match := _EPOCH.match(entry.path))}
    for other in epochs - kept:
        if max(attempt_numbers(other), default=0) <= attempt:
            store.delete_folder(other)


def best_checkpoint(checkpoints: list[Checkpoint], select: Select = "dice") -> Checkpoint | None:
    """Return the checkpoint of the best epoch, by its `score`; None when no epoch has ended."""
    whole = [checkpoint for checkpoint in checkpoints if checkpoint.whole]
    return max(whole, key=lambda checkpoint: score(checkpoint.record, select), default=None)


def best_weights(
    store: Store, checkpoints: Sequence[Checkpoint], select: Select = "dice"
) -> tuple[Checkpoint, bytes] | None:
    """Return the best checkpoint whose weights are whole, and these; None when there is none."""
    left = list(checkpoints)
    while (best := best_checkpoint(left, select)) is not None:
        weights = store.read(f"{best.path}/{MODEL}")
        if hashlib.sha256(weights).hexdigest() == best.state["files"][MODEL]["sha256"]:
            return best, weights
        left.remove(best)
    return None


def fetch(store: Store, checkpoint: Checkpoint, into: Path) -> None:
    """Copy a checkpoint's files to a local folder."""
    for name in (*FILES, STATE):
        (into / name).write_bytes(store.read(f"{checkpoint.path}/{name}"))


def attempts(store: Store, folder: str) -> Iterator[int]:
    """Yield numbers of the attempts below `folder`, as often as they have files."""
    for entry in store.list(folder):
        yield from attempt_numbers(entry.path)


def attempt_numbers(path: str) -> Iterator[int]:
    """Yield the numbers of the attempts that a path lies in."""
    for part in path.split("/"):
        if (match := re.fullmatch(r"attempt-(\d{1,9})", part)) is not None:
            yield int(match[1])


def _read(store: Store, path: str, sizes: dict[str, int]) -> Checkpoint | None:
    if sizes[f"{path}/{STATE}"] > SMALL:
        return None
    try:
        state = json.loads(store.read(f"{path}/{STATE}"))
        files = state["files"]
        there = set(files) == set(FILES) and all(sizes[f"{path}/{name}"] == files[name]["size"] for name in FILES)
        found = Checkpoint(path, state)
        usable = found.place > (0, 0) and (not found.whole or score(found.record)[0] <= 1)
    except (ValueError, FileNotFoundError):  # cut by a kill, or deleted meanwhile
        return None
    except (LookupError, TypeError, RecursionError):  # nothing that a training writes
        return None
    return found if there and usable else None
