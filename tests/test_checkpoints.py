"""Keeping checkpoints: the newest and the best stay, a store in trouble is waited for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from torch import nn

from apacs_ray.errors import ApacsError
from apacs_ray.storage import LocalStore, Store, open_store
from apacs_ray.training.checkpoints import best_checkpoint, best_weights, complete_checkpoints, fetch, keep_checkpoint
from apacs_ray.training.history import EpochPart, EpochRecord
from apacs_ray.training.state import TrainState, load_state, save_state, snapshot


def state(dice: list[float]) -> TrainState:
    model = nn.Linear(2, 1)
    history = tuple(EpochRecord(epoch, 0.0, 0.0, 0.0, value, 0.1, 1.0) for epoch, value in enumerate(dice))
    return TrainState(model, torch.optim.SGD(model.parameters(), lr=0.1), history)


def keep(store: Store, dice: list[float], folder: Path, attempt: int = 1) -> TrainState:
    kept = state(dice)
    save_state(folder, snapshot(kept))
    keep_checkpoint(store, "members/fcn8/.state-1", attempt, folder)
    return kept


@pytest.mark.parametrize("where", ["local", "s3"])
def test_newest_and_best_are_kept(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    uri = str(tmp_path / "run") if where == "local" else f"{request.getfixturevalue('s3')}/run"
    store = open_store(uri)
    dice = [0.1, 0.7, 0.4, 0.5]
    for epoch in range(len(dice)):
        last = keep(store, dice[: epoch + 1], tmp_path / f"{epoch}", attempt=1 + epoch // 3)
    found = complete_checkpoints(store, "members/fcn8/.state-1")
    assert [checkpoint.epoch for checkpoint in found] == [1, 3]
    best = best_checkpoint(found)
    assert best is not None
    assert best.epoch == 1
    assert found[1].path.endswith("/attempt-2/epoch_00003")
    assert len(list(store.list("members"))) == 2 * 3
    (tmp_path / "again").mkdir()
    fetch(store, found[1], tmp_path / "again")
    model = nn.Linear(2, 1)
    load_state(tmp_path / "again", model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert torch.equal(model.weight, last.model.weight)


def test_one_from_the_middle_of_an_epoch_is_the_newest_but_never_the_best(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "run"))

    def leave(dice: list[float], steps: int) -> None:
        left = replace(state(dice), part=EpochPart(len(dice), steps, (1.0,) * 5, 1.0))
        save_state(tmp_path / "left", snapshot(left))
        keep_checkpoint(store, "members/fcn8/.state-1", 1, tmp_path / "left")

    def places() -> list[tuple[int, int]]:
        return [checkpoint.place for checkpoint in complete_checkpoints(store, "members")]

    leave([], 3)  # before the first epoch has ended
    assert (places(), best_checkpoint(complete_checkpoints(store, "members"))) == ([(0, 3)], None)
    keep(store, [0.7], tmp_path / "0")
    assert places() == [(1, 0)]
    leave([0.7], 2)
    leave([0.7], 5)
    assert places() == [(1, 0), (1, 5)]
    best = best_checkpoint(complete_checkpoints(store, "members"))
    assert best is not None
    assert best.whole
    keep(store, [0.7, 0.4], tmp_path / "1")
    assert places() == [(1, 0), (2, 0)]
    assert len(list(store.list("members"))) == 2 * 3


def test_a_damaged_one_takes_no_place(tmp_path: Path) -> None:
    """Training passed over it and went on before it: what is done since must stay, and other weights be taken."""
    store = LocalStore(str(tmp_path / "run"))
    folder = "members/fcn8/.state-1"
    keep(store, [0.1, 0.2, 0.9], tmp_path / "0")
    damaged = tmp_path / "run" / folder / "attempt-1/epoch_00002/model.safetensors"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    fresh = keep(store, [0.1, 0.2], tmp_path / "1", attempt=2)
    found = complete_checkpoints(store, folder)
    assert [checkpoint.epoch for checkpoint in found] == [1, 2]
    best = best_weights(store, found)
    assert best is not None
    assert best[0].epoch == 1
    assert torch.equal(load(best[1])["weight"], fresh.model.weight)
    assert best_weights(store, found[1:]) is None


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the run should be")
    with pytest.raises(ApacsError, match="cannot write"):
        keep(LocalStore(str(tmp_path / "run")), [0.1], tmp_path / "local")
