"""Seconds in which training stands still for a checkpoint of FCN-8 at width 1.0, on a disk and in a store over HTTP.

One training goes on with small crops while `CheckpointWriter` writes its state. It stands still while the state is
copied to the host, and its steps are slower while the thread writes, which shares cores and the interpreter with
them: both are counted, against steps without a checkpoint in the same run. The store is moto in a process of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from measure import options, require, show

from apacs_ray.config.settings import RunSettings
from apacs_ray.config.training_settings import TrainingSettings
from apacs_ray.models.registry import build_member
from apacs_ray.storage import Store, open_store
from apacs_ray.training.batch import Sample, batches
from apacs_ray.training.checkpoints import complete_checkpoints, keep_checkpoint
from apacs_ray.training.history import EpochPart
from apacs_ray.training.loop import Trainer
from apacs_ray.training.sampler import SampleRef
from apacs_ray.training.state import Snapshot, TrainState, save_state
from apacs_ray.training.writer import CheckpointWriter

TARGET = 0.01  # of the time between two checkpoints
CROP = 64  # px
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


class Steps:
    """Training steps, as many as are asked for."""

    def __init__(self, width: float) -> None:
        settings = TrainingSettings(batch_size=2, jitter=0)
        self.trainer = Trainer(build_member("fcn8", width=width), settings, seed=0, device=torch.device("cpu"))
        refs = [SampleRef(0, "train", 0, row, 1.0, row) for row in range(2)]
        pixels = torch.zeros(CROP, CROP, 3, dtype=torch.uint8).numpy()
        (self._batch,) = batches(iter([Sample(ref, "tile", pixels, pixels[..., 0]) for ref in refs]), 2)
        self.trainer.begin_epoch()
        self._step = itertools.count()

    def __call__(self) -> None:
        """Do one."""
        self.trainer.take(replace(self._batch, step=next(self._step)), 1 << 20)

    def state(self) -> TrainState:
        """What a checkpoint in the middle of an epoch holds."""
        return TrainState(self.trainer.model, self.trainer.optimizer, (), EpochPart(0, 1, (0.0,) * 5, 1.0))


def main() -> None:
    """Measure the stand-still for each store, and fail when it is more than a hundredth of the time between two."""
    arguments = options(__doc__ or "", "one checkpoint in each store").parse_args()
    repetitions = 1 if arguments.quick or arguments.smoke else 3
    steps = Steps(0.05 if arguments.smoke else 1.0)
    rows: list[dict[str, Any]] = []
    between = 60 * RunSettings().checkpoint_minutes
    for _ in range(3):
        steps()
    with tempfile.TemporaryDirectory() as folder, _http_store() as uri:
        for name, store in (("a disk", open_store(f"{folder}/run")), ("HTTP", open_store(uri))):
            measured = [_measure(steps, store) for _ in range(repetitions)]
            size = sum(entry.size for entry in store.list("state"))
            copied, written, still = (statistics.median(column) for column in zip(*measured, strict=True))
            rows.append(
                {
                    "store": name,
                    "MB": size / 1e6,
                    "copied_s": copied,
                    "written_s": written,
                    "stands_still_s": still,
                    "of_10_min": still / between,
                }
            )
    show("a checkpoint of FCN-8 beside its training", rows, arguments.json)
    if not arguments.smoke:
        require(all(row["of_10_min"] < TARGET for row in rows), "training stands still for more than 1 %")


def _measure(steps: Steps, store: Store) -> tuple[float, float, float]:
    """Write one checkpoint; return seconds of the copy, until all is written, and by which training came later."""
    plain = _seconds_of(steps, 5)
    done = threading.Event()
    saved: list[float] = []  # when the files lie on this machine

    def keep(state: Snapshot) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_state(Path(folder), state)
            saved.append(time.perf_counter() - began)
            keep_checkpoint(store, "state", 1, Path(folder))
        done.set()

    began = time.perf_counter()
    with CheckpointWriter() as writer:
        writer.write("fcn8", steps.state(), keep)
        copied = time.perf_counter() - began
        ends = []
        while not done.is_set():
            steps()
            ends.append(time.perf_counter() - began)
        written = time.perf_counter() - began
    require(len(complete_checkpoints(store, "state")) == 1, "the checkpoint is not complete")
    plain = min(plain, _seconds_of(steps, 5))
    _trace(copied, saved[0], ends, plain)
    return copied, written, written - len(ends) * plain


def _trace(copied: float, saved: float, ends: list[float], plain: float) -> None:
    """Print what went on at a time: a thread that writes, and steps of training, which take `plain` s alone."""
    print("   0.00 s  training stands still: its state is copied to the host")
    print(f"{copied:7.2f} s  training goes on, a thread writes the files")
    before = copied
    for until, what in ((saved, "they are sent to the store"), (ends[-1] if ends else saved, "all is there")):
        within = [end for end in ends if before < end <= until]
        pace = f", {(within[-1] - before) / len(within):.2f} s each ({plain:.2f} without)" if within else ""
        print(f"{until:7.2f} s  {what}; {len(within)} steps ended meanwhile{pace}", flush=True)
        before = until


def _seconds_of(steps: Steps, count: int) -> float:
    """Return the median seconds of a step."""
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        steps()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@contextlib.contextmanager
def _http_store() -> Iterator[str]:
    """A bucket that answers over HTTP, from another process."""
    import boto3

    with subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-p", "0"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as server:
        require(server.stderr is not None, "no server")
        assert server.stderr is not None
        line = next(line for line in server.stderr if "Running on" in line)
        threading.Thread(target=server.stderr.read, daemon=True).start()
        os.environ.update({**KEYS, "AWS_ENDPOINT_URL": line.split()[-1]})
        boto3.client("s3").create_bucket(Bucket="benchmark")
        try:
            yield "s3://benchmark/run"
        finally:
            server.kill()


if __name__ == "__main__":
    main()
