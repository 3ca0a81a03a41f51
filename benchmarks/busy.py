"""How busy the GPUs are while a command runs, and how much of their memory it takes, by what `nvidia-smi` says.

    python benchmarks/busy.py -- python pipelines/segment.py --model runs/cells --slides slides --output masks
    python benchmarks/busy.py -- python pipelines/tune_fusion.py --data ... --output ...    heatmaps and the sweep

It looks five times a second from beside, so that nothing in the command is changed, and from its start to its end, so
that what is not arithmetic counts: starting, reading, writing. A GPU is busy in a look when a kernel ran in it; what
part of its arithmetic that took is what `training.py` and `inference.py` tell. Without a GPU only the command is timed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from measure import options, show

ASK = ["nvidia-smi", "--query-gpu=index,utilization.gpu,memory.used", "--format=csv,noheader,nounits", "-lms", "200"]
FIRST = 10.0  # s in which nvidia-smi says its first line; the command begins then
TRIFLE = [sys.executable, "-c", "sum(range(10**7))"]  # for --quick and --smoke


def main() -> None:
    """Run the command and print what the GPUs did; exit as it did."""
    parser = options(__doc__ or "", "a command that takes a moment")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and what is to be run")
    arguments = parser.parse_args()
    command = arguments.command[arguments.command[:1] == ["--"] :] or TRIFLE
    with _Looks() as looks:
        began = time.perf_counter()
        status = subprocess.call(command)
        seconds = time.perf_counter() - began
    rows = rows_of(looks.lines)
    if not rows:
        print("GPU: not measured (no nvidia-smi here, or it tells nothing of them)")
    show(" ".join(command), [{"of": "the command", "s": seconds}, *rows], arguments.json)
    raise SystemExit(status)


class _Looks:
    """The lines that `nvidia-smi` prints while the block runs; none without it."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._first = threading.Event()

    def __enter__(self) -> _Looks:
        self._process = None
        if shutil.which(ASK[0]):
            self._process = subprocess.Popen(ASK, stdout=subprocess.PIPE, text=True, env={**os.environ, "LC_ALL": "C"})
            self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
            self._reader.start()
            self._first.wait(FIRST)
        return self

    def _read(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.lines.append(line)
            self._first.set()

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()


def rows_of(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Return a row a GPU of lines as `ASK` prints them: looks, % of the time busy, GiB at most.

    A GPU that tells no numbers, as one that is split by MIG, has none.
    """
    seen: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in lines:
        index, *values = (word.strip() for word in line.split(","))
        if len(values) == 2 and all(value.replace(".", "", 1).isdigit() for value in values):
            seen[index].append((float(values[0]), float(values[1])))
    return [
        {
            "of": f"GPU {index}",
            "looks": len(looks),
            "busy_%": sum(busy for busy, _ in looks) / len(looks),
            "looks_idle_%": 100 * sum(busy == 0 for busy, _ in looks) / len(looks),
            "GiB_at_most": max(memory for _, memory in looks) / 1024,
        }
        for index, looks in sorted(seen.items())
    ]


if __name__ == "__main__":
    main()
