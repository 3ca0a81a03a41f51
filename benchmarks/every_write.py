"""Let each write of each stage fail, run the stage again, and compare what is left with a stage that nothing met.

A write fails once as of a store in trouble, once as of a full disk, or for good, as for a process that dies there. Each
stage is struck when it is done for the first time; after it was done with other settings; and with other settings that
are then given up. Stages run in one process without Ray, but the sweep, of which only the books are kept (see
`apacs_ray/testing/alone.py`).

Then whole runs on Ray are struck at random writes, whichever process makes them, and started again.

Checked: that all files are those of an undisturbed run, apart from times, and that after the fault, too, no record says
what is not on disk. Counted as done again: shards and epochs that were complete at the fault.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import options, require, show  # noqa: E402

from apacs_ray.commands.shell import run_command  # noqa: E402
from apacs_ray.config.settings import Settings  # noqa: E402
from apacs_ray.testing.every_write import NAMES, OTHER, SETTINGS, STORIES, Site, Story  # noqa: E402
from apacs_ray.testing.faulty_store import KINDS, Kind, ManyProcesses  # noqa: E402
from apacs_ray.testing.runs import write_cells  # noqa: E402
from apacs_ray.testing.wholeness import differences, lies  # noqa: E402

STRIKE = "--strike"  # makes this program the driver of a run: OUTPUT DATA COUNTER NUMBER KIND
NONE = -1  # number of no write


def main() -> None:
    """Strike stages and whole runs, print what came of it, and fail when anything is not as it should be."""
    parser = options(__doc__ or "", "every fifth write, two whole runs")
    parser.add_argument("--stages", default=",".join(NAMES), help="these only")
    parser.add_argument("--runs", type=int, default=20, help="whole runs that are struck")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    stages = ["ingest"] if arguments.smoke else [name for name in arguments.stages.split(",") if name]
    stories = STORIES[:1] if arguments.smoke else STORIES
    every = 5 if arguments.smoke or arguments.quick else 1
    runs = 0 if arguments.smoke else min(2, arguments.runs) if arguments.quick else arguments.runs
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = str(write_cells(Path(folder, "cells"), train=4, test=2))
        with _quiet():
            site = Site(Path(folder), data, SETTINGS, OTHER)
            for stage in stages:
                for story in stories:
                    rows.append(_strike_stage(site, stage, story, every))
                    print(rows[-1], file=sys.stderr, flush=True)
        if runs:
            rows.append(_strike_runs(Path(folder), data, runs, random.Random(arguments.seed)))
    show("faults between two writes", rows, arguments.json)
    require(all(row["writes"] for row in rows), "nothing was struck")
    require(not any(row["defects"] for row in rows), "a fault changed what is left, or a record lied")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Run stages without Ray, and without what they say."""
    from apacs_ray.testing.alone import alone

    logging.disable(logging.WARNING)
    with alone(), contextlib.redirect_stdout(io.StringIO()):
        yield
    logging.disable(logging.NOTSET)


def _strike_stage(site: Site, stage: str, story: Story, every: int) -> dict[str, Any]:
    """Strike a stage at its writes in all ways; in the stories with other settings in one way each, by turns."""
    started, writes = time.monotonic(), site.count(stage, story)
    points = [
        site.strike(stage, story, at, kind)
        for at in range(0, writes, every)
        for kind in (KINDS if story == "fresh" else [KINDS[at // every % len(KINDS)]])
    ]
    for point in points:
        if point.defects or not point.raised:
            print(stage, story, point, file=sys.stderr, flush=True)
    return {
        "struck": stage,
        "story": story,
        "writes": writes,
        "points": len(points),
        "done_again": sum(len(point.again) for point in points),
        "defects": sum(bool(point.defects) or not point.raised for point in points),
        "s": time.monotonic() - started,
    }


def _strike_runs(folder: Path, data: str, runs: int, draw: random.Random) -> dict[str, Any]:
    """Strike whole runs on Ray at random writes; each is started again until it comes to its end."""
    started, defects = time.monotonic(), 0
    undisturbed, count = folder / "undisturbed", folder / "count"
    require(_drive(undisturbed, data, count, NONE, "dead") == 0, "the undisturbed run failed")
    writes = len((count / "writes").read_text().splitlines())
    for number in range(runs):
        at, kind = draw.randrange(writes), KINDS[number % len(KINDS)]
        output, counter = folder / f"whole-{number}", folder / f"count-{number}"
        first = _drive(output, data, counter, at, kind)  # Ray tries again what a single fault met, so it may go well
        wrong = [f"after the fault: {lie}" for lie in lies(output)]
        again = _drive(output, data, folder / f"again-{number}", NONE, "dead")
        wrong += [f"status {again}"] if again else [f"in the end: {lie}" for lie in lies(output)]
        wrong += [f"differs: {path}" for path in differences(output, undisturbed)]
        struck = (counter / "writes").read_text().splitlines()[at].replace(f"{output}/", "")
        print(f"{kind} at {at} of {writes}, {struck}: status {first}; {'; '.join(wrong) or 'well'}", file=sys.stderr)
        defects += bool(wrong)
    row = {"struck": "whole run on Ray", "story": "fresh", "writes": writes, "points": runs, "defects": defects}
    return {**row, "s": time.monotonic() - started}


def _drive(output: Path, data: str, counter: Path, at: int, kind: Kind) -> int:
    """Run all stages in a driver of its own; return its exit status."""
    counter.mkdir()
    command = [sys.executable, __file__, STRIKE, str(output), data, str(counter), str(at), kind]
    with (counter / "log").open("wb") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode


def _driver(output: str, data: str, counter: str, at: str, kind: Kind) -> int:
    """Do what `full.py` does, on a store that fails."""
    from apacs_ray.distributed.session import RaySession, prepare_ray

    prepare_ray()
    from apacs_ray.runs.run import Run
    from apacs_ray.stages.pipeline import run_pipeline
    from apacs_ray.testing.faulty_store import FaultyStore

    settings = Settings.model_validate({**SETTINGS, "fusion": {**SETTINGS["fusion"], "from_best": False}})
    run = Run.open(FaultyStore(output, ManyProcesses(counter, int(at), kind, os.getpid())), settings, data)
    ray = RaySession(run)
    try:
        run_pipeline(run, ray, NAMES)
    finally:
        ray.stop()
        run.close()
    return 0


if __name__ == "__main__":
    if STRIKE in sys.argv[1:2]:
        run_command(lambda: _driver(*sys.argv[2:]))  # type: ignore[arg-type]
    main()
