"""Seconds until a run begins, started here and submitted as a job, and the head's memory during a job.

Begun: seconds from the command to the first line it prints, to the first shard of tiles and to the first training
step. The default run's data (smears rendered beforehand, so that ingest begins with cutting), networks of a tenth of
the width. Job: on a cluster whose head has no CPU for tasks and whose two nodes have one each. Memory: resident, shared
pages divided among those who share them, of the head's processes and the job's driver, looked at twice a second.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import options, require, show  # noqa: E402

from apacs_ray.storage import LocalStore  # noqa: E402
from apacs_ray.synthetic.slide import slide_specs  # noqa: E402
from apacs_ray.synthetic.write import write_smear  # noqa: E402
from apacs_ray.testing.cluster import RayCluster, processes  # noqa: E402
from apacs_ray.testing.jobs import ENDED, Job  # noqa: E402
from apacs_ray.testing.runs import start  # noqa: E402

SETTINGS = [
    "--tiles.size", "512", "--tiles.shard", "8",
    "--members.width", "0.1", "--members.epochs", "2", "--members.crop", "256", "--members.batch_size", "2",
    "--fusion.from_best", "false",
]  # fmt: skip
SMALLEST = [
    "--tiles.size", "128", "--members.crop", "64", "--members.precision", "float32", "--members.mode", "together",
    "--fusion.crop", "256", "--fusion.precision", "auto",
]  # fmt: skip
CHECK_EVERY = 20.0  # s between checks that a run goes on: each is a process beside it
PARTS = {"gcs": "gcs_server", "raylet": "/raylet ", "dashboard": "dashboard/", "driver": "pipelines/full.py"}


def main() -> None:
    """Measure starts of both kinds and the head's memory, and print the tables."""
    arguments = options(__doc__ or "", "one repetition").parse_args()
    repetitions = 1 if arguments.quick or arguments.smoke else 3
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "smears"
        sides = (256, 256) if arguments.smoke else (2560, 2048)
        for number, spec in enumerate(slide_specs(0, *sides, train=3, test=2)):
            write_smear(LocalStore(str(data)), spec, number)
        given = ["--data", str(data), *SETTINGS, *(SMALLEST if arguments.smoke else [])]
        runs = [_here(given, Path(folder) / f"here-{number}") for number in range(repetitions)]
        rows.append({"way": "python pipelines/full.py", **_middle(runs)})
        print(rows[0], flush=True)
        jobs, memory = [], {}
        for number in range(repetitions):
            times, memory = _submitted(given, Path(folder) / f"job-{number}", to_its_end=not arguments.smoke)
            jobs.append(times)
        rows.append({"way": "ray job submit", **_middle(jobs)})
        show("seconds until a run begins", rows, arguments.json)
        show("memory of the head over a job, MB", memory_rows(memory), None)
        if arguments.json:
            arguments.json.write_text(json.dumps({"begins": rows, "head_MB": memory}, indent=1))
    require(all(row["first_shard_s"] > 0 for row in rows), f"a shard was there before its run: {rows}")
    require(rows[0]["first_step_s"] > rows[0]["first_shard_s"], f"a step came before the first shard: {rows}")
    require(memory["gcs"][-1] > 0 and memory["driver"][-1] > 0, "the head's processes were not found")


def _middle(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _here(given: list[str], output: Path) -> dict[str, float]:
    """Start a run on this machine, end it when it has trained an epoch, and return its milestones in seconds."""
    began = time.time()
    process = start("--output", str(output), *given)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        printed = time.time()
        threading.Thread(target=process.stdout.read, daemon=True).start()
        times = {"first_line_s": printed - began, **_milestones(output, began, lambda: process.poll() is None)}
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(output, ignore_errors=True)
    return times


def _submitted(given: list[str], folder: Path, *, to_its_end: bool) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Submit the same as a job, to its end or first shard; return milestones, and the head's memory (MB) by part."""
    folder.mkdir()
    cluster = RayCluster(folder, head_cpus=0)
    try:
        for _ in range(2):
            cluster.add_node(cpus=1)
        memory: dict[str, list[float]] = defaultdict(list)
        ended = threading.Event()
        watcher = threading.Thread(target=_watch, args=(cluster, memory, ended), daemon=True)
        watcher.start()
        began = time.time()
        job = Job(cluster, "pipelines/full.py", "--output", str(folder / "run"), *given)
        submitted = time.time()
        milestones = _milestones(folder / "run", began, lambda: job.status() not in ENDED, steps=to_its_end)
        times = {"submitted_s": submitted - began, **milestones}
        print(times, flush=True)
        status = job.end() if to_its_end else job.status()
        ended.set()
        watcher.join()
        if not to_its_end:
            job.stop()
        require(status == ("SUCCEEDED" if to_its_end else "RUNNING"), f"the job is {status}:\n{job.logs()}")
        return times, dict(memory)
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _milestones(output: Path, began: float, goes_on: Callable[[], bool], *, steps: bool = True) -> dict[str, float]:
    """Return the seconds since `began` until the first shard and, with `steps`, until the first training step."""
    shard = _first(output, "tiles/split=*/*.parquet", goes_on).stat().st_mtime
    if not steps:
        return {"first_shard_s": shard - began}
    state = _first(output, "members/*/.state-*/attempt-*/epoch_00000/state.json", goes_on)
    time.sleep(0.2)  # it is written at once, but the metadata of the folder may come later
    (record,) = json.loads(state.read_text())["history"]
    return {"first_shard_s": shard - began, "first_step_s": state.stat().st_mtime - record["seconds"] - began}


def _first(output: Path, pattern: str, goes_on: Callable[[], bool]) -> Path:
    checked = time.monotonic()
    while not (files := sorted(output.glob(pattern), key=lambda path: path.stat().st_mtime)):
        time.sleep(0.02)
        if time.monotonic() - checked > CHECK_EVERY:
            checked = time.monotonic()
            if not goes_on():
                raise SystemExit(f"the run ended before there was {pattern}")
    return files[0]


def _watch(cluster: RayCluster, memory: dict[str, list[float]], ended: threading.Event) -> None:
    """Record the memory of the head's processes, MB, by part; the driver, which Ray starts apart, by its command."""
    while not ended.wait(0.5):
        sums = dict.fromkeys([*PARTS, "other"], 0.0)
        titles = dict(processes(cluster.head))
        driver = ["pgrep", "-f", r"^\S*python\S* pipelines/full\.py"]
        for pid in subprocess.run(driver, capture_output=True, text=True).stdout.split():
            titles.setdefault(int(pid), "pipelines/full.py")
        for pid, title in titles.items():
            part = next((name for name, word in PARTS.items() if word in title), "other")
            sums[part] += _proportional(pid)
        for name, value in sums.items():
            memory[name].append(value)


def _proportional(pid: int) -> float:
    """Return the resident memory in MB, pages that processes share divided among them."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended meanwhile
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("Pss:")), 0.0)


def memory_rows(memory: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return rows of memory before the job's driver runs, after a third, at the end, and at most."""
    totals = [sum(values) for values in zip(*memory.values(), strict=True)]
    return [
        {"part": name, "start": values[0], "third": values[len(values) // 3], "end": values[-1], "most": max(values)}
        for name, values in [*memory.items(), ("in all", totals)]
    ]


if __name__ == "__main__":
    main()
