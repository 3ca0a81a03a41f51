"""Small whole runs as a user starts them: a script in a process of its own, its output folder, its summary."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from apacs_ray.synthetic.slide import render_region, slide_specs

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
TILE = 64
SMALL = [
    "--tiles.size", str(TILE), "--tiles.shard", "4",
    "--members.mode", "together", "--members.width", "0.02", "--members.epochs", "3", "--members.crop", "48",
    "--members.precision", "float32", "--members.learning_rate", "0.002",
    "--fusion.epochs", "2", "--fusion.crop", "56", "--fusion.learning_rate", "0.0001", "--fusion.from_best", "false",
]  # fmt: skip
SWEPT = ["--fusion.from_best", "true", "--tune.config"]  # the path of a sweep follows
SLOWLY = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "2"}  # Ray's own: an epoch takes seconds, in which it can be met
PATIENCE = 400  # s after which a run that should end has hung


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    status: int
    text: str

    @property
    def summary(self) -> str:
        """What it printed last, for a failed assertion."""
        return self.text[-3000:]


def write_cells(folder: Path, train: int = 10, test: int = 4) -> Path:
    """A data set in the folder layout, cut from synthetic smears; one name has a space and letters beyond ASCII."""
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


def start(*argv: str, script: str = "full.py", env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    """Start a script in a session of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | (env or {})
    return subprocess.Popen(
        [sys.executable, str(ROOT / "pipelines" / script), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background ignores
    )


def run(*argv: str, script: str = "full.py", env: dict[str, str] | None = None) -> Done:
    """Run a script to its end."""
    process = start(*argv, script=script, env=env)
    text, _ = process.communicate(timeout=PATIENCE)
    return Done(process.returncode, text)


def wait_for(process: subprocess.Popen[str], reached: Callable[[], T]) -> T:
    """Wait until `reached` says something true, and return it; fails the test when the run ends before."""
    deadline = time.monotonic() + PATIENCE
    while not (found := reached()):
        assert process.poll() is None, f"the run ended too early: {process.communicate()[0][-2000:]}"
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.02)
    return found


def kill_when(process: subprocess.Popen[str], reached: Callable[[], bool], how: int = signal.SIGKILL) -> Done:
    """Signal the driver as soon as `reached`."""
    wait_for(process, reached)
    process.send_signal(how)
    text, _ = process.communicate(timeout=PATIENCE)
    return Done(process.returncode, text)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def read_trials(output: Path) -> list[dict[str, str]]:
    """What a sweep's trials came to, apart from their names and how long they took, in an order of their own."""
    with (output / "tune/trials.csv").open() as lines:
        rows = [{k: v for k, v in row.items() if k not in ("trial_id", "seconds")} for row in csv.DictReader(lines)]
    return sorted(rows, key=str)
