"""Seconds, process starts and decoding of `members.mode together` and `parallel` on a small machine.

The same members learn from the same tiles in both modes, by turns, each time in a stage script of its own. Seconds: of
the stage, from its start to its end. CPU: of all processes of the run, and of those that read and decode tiles.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from measure import options, require, show  # noqa: E402

from apacs_ray.storage import LocalStore  # noqa: E402
from apacs_ray.synthetic.slide import slide_specs  # noqa: E402
from apacs_ray.synthetic.write import write_smear  # noqa: E402
from apacs_ray.testing.cluster import processes  # noqa: E402
from apacs_ray.testing.runs import read_json, start  # noqa: E402

SETTINGS = [
    "--tiles.size", "512", "--tiles.shard", "8",
    "--members.epochs", "3", "--members.crop", "256", "--members.batch_size", "2",
]  # fmt: skip
SMALLEST = ["--tiles.size", "128", "--members.epochs", "1", "--members.crop", "64", "--members.precision", "float32"]
MODES = ("together", "parallel")
DECODES = "ray::MapBatches(load)"
TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Process:
    """A process of a run: its titles so far, and its CPU seconds at the last look."""

    titles: set[str]
    cpu: float


def main() -> None:
    """Train in both modes by turns and print the table."""
    parser = options(__doc__ or "", "one repetition")
    parser.add_argument("--width", type=float, default=0.1, help="of the networks")
    arguments = parser.parse_args()
    modes = MODES[:1] if arguments.smoke else MODES  # three trainings at a time start too much for a smoke test
    runs_of: dict[str, list[dict[str, Any]]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory() as folder:
        data, cut = Path(folder) / "smears", Path(folder) / "cut"
        sides = (256, 256) if arguments.smoke else (2560, 2048)
        for number, spec in enumerate(slide_specs(0, *sides, train=3, test=1)):
            write_smear(LocalStore(str(data)), spec, number)
        given = ["--data", str(data), *SETTINGS, "--members.width", str(arguments.width)]
        given += SMALLEST if arguments.smoke else []
        _end(start(*given, "--output", str(cut), script="ingest.py"))
        for _ in range(1 if arguments.quick or arguments.smoke else 5):
            for mode in modes:
                output = Path(folder) / mode
                shutil.copytree(cut, output)
                runs_of[mode].append(_train(output, [*given, "--output", str(output), "--members.mode", mode]))
                shutil.rmtree(output)
                print(mode, runs_of[mode][-1], flush=True)
    rows = [
        {"mode": mode, **{name: statistics.median(run[name] for run in runs) for name in runs[0]}}
        for mode, runs in runs_of.items()
    ]
    together, parallel = rows[0], rows[-1]
    require(all(row["decoding_cpu_s"] > 0 for row in rows), f"no process decoded tiles: {rows}")
    require(arguments.smoke or together["processes"] < parallel["processes"], f"together starts as many: {rows}")
    shares = {name: together[name] / parallel[name] for name in together if name != "mode"}
    show("three members on one machine", [*rows, {"mode": "together / parallel", **shares}], arguments.json)


def _train(output: Path, given: list[str]) -> dict[str, Any]:
    process = start(*given, script="train_members.py")
    observed: dict[int, Process] = {}
    watcher = threading.Thread(target=_watch, args=(process, observed))
    watcher.start()
    _end(process)
    watcher.join()
    workers = [one for one in observed.values() if any(title.startswith("ray::") for title in one.titles)]
    return {
        "seconds": read_json(output / "run.json")["stages"]["train_members"]["seconds"],
        "processes": len(workers),
        "cpu_s": sum(one.cpu for one in observed.values()),
        "decoding_cpu_s": sum(one.cpu for one in workers if DECODES in one.titles),
    }


def _watch(process: subprocess.Popen[str], observed: dict[int, Process]) -> None:
    while process.poll() is None:
        for pid, title in processes(process).items():
            try:
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            one = observed.setdefault(pid, Process(set(), 0.0))
            one.titles.add(title.strip())
            one.cpu = (int(stat[11]) + int(stat[12])) / TICK
        time.sleep(0.2)


def _end(process: subprocess.Popen[str]) -> None:
    text, _ = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"a run failed:\n{text[-3000:]}")


if __name__ == "__main__":
    main()
