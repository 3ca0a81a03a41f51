"""Training checkpoints of one network in a run: which are complete, which is the newest, which the best.

Every attempt (a start of the same training) has its folder `attempt-N` with `epoch_NNNNN` checkpoints in it. A
checkpoint counts when the files that its `state.json` names are there with the sizes it gives; hashes are checked when
it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apacs_ray.storage import Store
from apacs_ray.training.record import EpochRecord, score

STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder in the store, and its `state.json`."""

    path: str
    state: dict[str, Any]

    @property
    def epoch(self) -> int:
        return int(self.state["epoch"])

    @property
    def record(self) -> EpochRecord:
        """This epoch, the last of the history."""
        return EpochRecord(**self.state["history"][-1])


def complete_checkpoints(store: Store, folder: str) -> list[Checkpoint]:
    """Every complete checkpoint below `folder`, oldest epoch first."""
    sizes = {entry.path: entry.size for entry in store.list(folder)}
    found = []
    for path in sizes:
        if path.endswith(f"/{STATE}") and "/attempt-" in f"/{path}":
            checkpoint = _read(store, path.removesuffix(f"/{STATE}"), sizes)
            if checkpoint is not None:
                found.append(checkpoint)
    return sorted(found, key=lambda checkpoint: (checkpoint.epoch, checkpoint.path))


def best_checkpoint(checkpoints: list[Checkpoint]) -> Checkpoint:
    """The highest validation Dice; the earlier epoch of equals."""
    return max(checkpoints, key=lambda checkpoint: score(checkpoint.record))


def fetch(store: Store, checkpoint: Checkpoint, into: Path) -> None:
    """Copy a checkpoint's files to a local folder."""
    for name in (*checkpoint.state["files"], STATE):
        (into / name).write_bytes(store.read(f"{checkpoint.path}/{name}"))


def attempts(store: Store, folder: str) -> Iterator[int]:
    """Numbers of the attempts below `folder`, as often as they have files."""
    for entry in store.list(folder):
        for part in entry.path.split("/"):
            if part.startswith("attempt-"):
                yield int(part.removeprefix("attempt-"))


def _read(store: Store, path: str, sizes: dict[str, int]) -> Checkpoint | None:
    try:
        state = json.loads(store.read(f"{path}/{STATE}"))
    except (ValueError, FileNotFoundError):  # cut by a kill, or deleted meanwhile
        return None
    files = state.get("files", {})
    if not files or any(sizes.get(f"{path}/{name}") != facts["size"] for name, facts in files.items()):
        return None
    return Checkpoint(path, state)
