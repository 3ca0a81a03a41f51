"""Small whole runs as a user starts them: a script in a process of its own, its output folder, its summary."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from PIL import Image

from apacs_ray.synthetic.slide import render_region, slide_specs
from apacs_ray.testing.cluster import kill_node

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent.parent  # of the checkout, where the scripts are
SLOWLY = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "2"}  # Ray's own: an epoch takes seconds, in which it can be met
TIMEOUT = 600  # s after which a run that should end has hung


class Process(Protocol):
    """A driver that runs: what is used here of `subprocess.Popen[str]`."""

    @property
    def pid(self) -> int:
        """Its process id, also that of its session."""

    @property
    def stdout(self) -> IO[str] | None:
        """What it prints."""

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal, None as long as it runs."""

    def poll(self) -> int | None:
        """Return the exit status, or None as long as it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return the exit status."""

    def communicate(self, input: None = None, timeout: float | None = None) -> tuple[str, Any]:
        """Wait for its end and return what it printed."""

    def send_signal(self, sig: int) -> None:
        """Send it a signal, unless it has ended."""

    def kill(self) -> None:
        """End it at once."""


@dataclass(frozen=True)
class Done:
    """A command that ended: its exit status and what it printed."""

    status: int | None
    text: str

    @property
    def summary(self) -> str:
        """What it printed last, for a failed assertion."""
        return self.text[-3000:]


def write_cells(folder: Path, train: int = 10, test: int = 4) -> Path:
    """Write a data set in the folder layout, of fields of synthetic smears.

    Args:
        folder: Where it is made; one name in it has letters beyond ASCII and a space.
        train: How many fields of 80 x 70 px there are to train on.
        test: How many there are to test on.

    Returns:
        `folder`.
    """
    specs = slide_specs(5, 640, 640, train=1, test=1)
    for spec, part, count in ((specs[0], "Train", train), (specs[1], "Test", test)):
        for kind in ("Input", "GroundTruth"):
            (folder / f"Cells_{part}_{kind}").mkdir(parents=True)
        for number in range(count):
            rgb, mask = render_region(spec, 90 * (number % 5), 90 * (number // 5), 80, 70)
            stem = f"fïeld {number:02d}"
            Image.fromarray(rgb).save(folder / f"Cells_{part}_Input" / f"{stem}.jpg", quality=92)
            Image.fromarray(mask).save(folder / f"Cells_{part}_GroundTruth" / f"{stem}.png")
    return folder


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment of a driver: this process's without settings of Ray, and `changes`."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | dict(changes or {})


def start(*argv: str, script: str = "full.py", env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a script of `pipelines/` in a session of its own.

    Args:
        *argv: The script's arguments.
        script: Its name.
        env: What differs from the environment of this process.

    Returns:
        Its process.
    """
    return subprocess.Popen(
        [sys.executable, str(ROOT / "pipelines" / script), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(env),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background ignores
    )


def run(*argv: str, script: str = "full.py", env: Mapping[str, str] | None = None) -> Done:
    """Run a script to its end; arguments as of `start`."""
    process = start(*argv, script=script, env=env)
    try:
        text, _ = process.communicate(timeout=TIMEOUT)
    finally:
        if process.poll() is None:  # it has hung
            kill_node(process)
    return Done(process.returncode, text)


def wait_for(process: Process, reached: Callable[[], T]) -> T:
    """Wait until `reached` says something true.

    Returns:
        What it said.

    Raises:
        AssertionError: The process ended before, or `reached` never said so.
    """
    deadline = time.monotonic() + TIMEOUT
    while not (found := reached()):
        assert process.poll() is None, f"the run ended too early: {process.communicate()[0][-2000:]}"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.02)
    return found


def kill_when(process: Process, reached: Callable[[], bool], how: int = signal.SIGKILL) -> Done:
    """Signal the driver as soon as `reached` says so, and wait for its end."""
    wait_for(process, reached)
    process.send_signal(how)
    text, _ = process.communicate(timeout=TIMEOUT)
    return Done(process.returncode, text)


def read_json(path: Path) -> Any:
    """Return what a JSON file holds."""
    return json.loads(path.read_text())


def read_growing(path: Path) -> Any:
    """Return what a JSON file holds that others may be writing: an empty dictionary where it is not whole (yet)."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def read_trials(output: Path) -> list[dict[str, str]]:
    """Return what a sweep's trials came to, apart from their names and how long they took, in an order of their own."""
    with (output / "tune/trials.csv").open() as lines:
        rows = [{k: v for k, v in row.items() if k not in ("trial_id", "seconds")} for row in csv.DictReader(lines)]
    return sorted(rows, key=str)
