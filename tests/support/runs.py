"""The small runs of these tests: their settings, and drivers that are forked, all of which end with their test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from support.forks import ForkedProcess, ForkServer, end_session

from apacs_ray.testing.runs import ROOT, TIMEOUT, Done, environment

TILE = 64
SMALL = [
    "--tiles.size", str(TILE), "--tiles.shard", "4",
    "--members.mode", "together", "--members.width", "0.02", "--members.epochs", "3", "--members.crop", "48",
    "--members.precision", "float32", "--members.learning_rate", "0.002",
    "--fusion.epochs", "2", "--fusion.crop", "56", "--fusion.learning_rate", "0.0001", "--fusion.from_best", "false",
]  # fmt: skip
SWEPT = ["--fusion.from_best", "true", "--tune.config"]  # the path of a sweep follows

Once = Callable[[str, Callable[[Path], None]], Path]  # the fixture `once`

_running: list[ForkedProcess] = []


@cache
def fork_server() -> ForkServer:
    """The server of this process, started when it is first needed."""
    return ForkServer(ROOT)


# Ray's own: so many workers start at once. A run allows more, for machines with more than two CPUs.
FEW_WORKERS = {"RAY_worker_maximum_startup_concurrency": "4"}


def start(*argv: str, script: str = "full.py", env: Mapping[str, str] | None = None) -> ForkedProcess:
    """Start a script in a session of its own, as `apacs_ray.testing.runs.start`; it ends with the test."""
    process = fork_server().start(*argv, script=script, env=environment({**FEW_WORKERS, **(env or {})}))
    _running.append(process)
    return process


def run(*argv: str, script: str = "full.py", env: Mapping[str, str] | None = None) -> Done:
    """Run a script to its end."""
    process = start(*argv, script=script, env=env)
    text, _ = process.communicate(timeout=TIMEOUT)
    return Done(process.returncode, text)


def end_all() -> None:
    """End what `start` started, with their Rays: nothing is left where a test ended early."""
    while _running:
        process = _running.pop()
        if process.poll() is None:
            end_session(process.pid)
        process.stdout.close()
