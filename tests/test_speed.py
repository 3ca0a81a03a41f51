"""Faster steps of one size: where they pay, that other batches do without, and that weights are as without them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from apacs_ray.config.training_settings import TrainingSettings
from apacs_ray.errors import ApacsError
from apacs_ray.models.registry import build_member
from apacs_ray.training.batch import Batch, Sample, batches
from apacs_ray.training.loop import Trainer
from apacs_ray.training.sampler import SampleRef
from apacs_ray.training.speed import PLAIN, SEARCH_PAYS, Speed, compile_trunk, plan_speed
from apacs_ray.training.state import save_state, snapshot

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
SIDE = 64
SETTINGS = TrainingSettings(batch_size=2, crop=SIDE, jitter=0, precision="float32", ema=0.5)


@pytest.mark.parametrize(
    ("changes", "search", "compiled"),
    [
        ({}, True, True),
        ({"tiles": 4 * SEARCH_PAYS // 100 - 4}, False, True),  # too short for the search
        ({"batch": 4, "micro_batch": 2, "tiles": 2 * SEARCH_PAYS // 100}, True, True),  # each step in two passes
        ({"compiled": False}, True, False),
        ({"device": CPU}, False, False),
        ({"deterministic": True}, False, False),
        ({"settings": TrainingSettings(crop=0, epochs=100)}, False, False),  # whole tiles, of any size
        ({"largest": 1024 * 1023}, False, False),  # no tile is as large as the crop
    ],
)
def test_where_it_pays(changes: dict[str, Any], search: bool, compiled: bool) -> None:
    given: dict[str, Any] = {
        "settings": TrainingSettings(crop=1024, epochs=100, batch_size=4),
        "device": CUDA,
        "largest": 1024 * 1024,
        "tiles": 4 * SEARCH_PAYS // 100,
        "batch": 4,
        "micro_batch": 4,
        "deterministic": False,
        "compiled": True,
    }
    given |= changes
    speed = plan_speed(given.pop("settings"), given.pop("device"), **given)
    assert (speed.search, speed.compiled) == (search, compiled)
    if search:
        assert speed.shape == (given["micro_batch"], 1024, 1024)


def a_batch(phase: Any = "train", side: int = SIDE, count: int = 2, step: int = 0) -> Batch:
    rng = np.random.default_rng(step)
    refs = [SampleRef(0, phase, step, row, 1 / count, row) for row in range(count)]
    pixels = [rng.integers(0, 256, (side, side, 3), np.uint8) for _ in refs]
    samples = [Sample(ref, "t", image, image[..., 0] // 128) for ref, image in zip(refs, pixels, strict=True)]
    (batch,) = batches(iter(samples), count)
    return batch


def test_only_usual_training_batches_are_searched_for() -> None:
    speed = Speed((2, SIDE, SIDE), search=True)
    for batch, searched in (
        (a_batch(), True),
        (a_batch("val"), False),
        (a_batch(side=SIDE // 2), False),
        (a_batch(count=1), False),
    ):
        with speed.for_batch(batch):
            assert torch.backends.cudnn.benchmark == searched
        assert not torch.backends.cudnn.benchmark
    with PLAIN.for_batch(a_batch()):
        assert not torch.backends.cudnn.benchmark


def trained(speed: Speed, folder: Path | None = None, first: int = 0) -> Trainer:
    """Two steps of a small network, one of an edge tile, and a validation; in a folder is what it goes on from."""
    torch.manual_seed(0)
    network = build_member("fcn32", width=0.02)
    if speed.compiled:
        compile_trunk(network)
    trainer = Trainer(network, SETTINGS, seed=0, device=CPU, speed=speed)
    if folder is not None:
        trainer.resume(folder)
    trainer.begin_epoch()
    for step in range(first, first + 2):
        trainer.take(a_batch(step=step), 9)
    trainer.take(a_batch(side=SIDE - 8, step=first + 2), 9)
    trainer.take(a_batch("val", side=SIDE + 16), 9)
    trainer.note_part()
    return trainer


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_a_compiled_trunk_learns_the_same_under_the_same_names(tmp_path: Path) -> None:
    """As torch traces and differentiates it. To compile that as well takes half a minute of a CPU: `test_gpu.py`."""
    from torch._dynamo.utils import counters

    counters.clear()
    plain = trained(PLAIN)
    with torch.compiler.set_stance("default", force_backend="aot_eager"):
        compiled = trained(Speed((2, SIDE, SIDE), compiled=True))
    assert counters["stats"]["unique_graphs"] == 1, "another size, or validation, was compiled as well"
    assert snapshot(plain.state()).weights.keys() == snapshot(compiled.state()).weights.keys()

    def require_close(one: Trainer, other: Trainer) -> None:
        for name, value in one.model.state_dict().items():
            torch.testing.assert_close(other.model.state_dict()[name], value, rtol=1e-3, atol=1e-5)

    require_close(plain, compiled)
    save_state(tmp_path / "compiled", snapshot(compiled.state()))  # on from there with the setting changed
    save_state(tmp_path / "plain", snapshot(plain.state()))
    require_close(trained(PLAIN, tmp_path / "plain", 3), trained(PLAIN, tmp_path / "compiled", 3))


def test_a_worker_that_cannot_compile_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(ApacsError, match=r"run\.compile: .*no-such-compiler"):
        compile_trunk(build_member("fcn32", width=0.02))
