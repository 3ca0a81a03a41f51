"""How busy the GPUs are while a command runs, and how much of their memory it takes, by what `nvidia-smi` says.

    python benchmarks/busy.py -- python pipelines/segment.py --model runs/cells --slides slides --output masks
    python benchmarks/busy.py -- python pipelines/tune_fusion.py --data ... --output ...    heatmaps and the sweep

It looks five times a second from beside, so that nothing in the command is changed, and from its start to its end, so
that what is not arithmetic counts: starting, reading, writing. A GPU is busy in a look when a kernel ran in it; what
part of its arithmetic that took is what `training.py` and `inference.py` tell. Without a GPU only the command is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
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
    with _looks() as lines:
        began = time.perf_counter()
        status = subprocess.call(command)
        seconds = time.perf_counter() - began
    rows = rows_of(lines)
    if not rows:
        print("GPU: not measured (no nvidia-smi here, or it tells nothing of them)")
    show(" ".join(command), [{"of": "the command", "s": seconds}, *rows], arguments.json)
    raise SystemExit(status)


@contextlib.contextmanager
def _looks() -> Iterator[list[str]]:
    """Yield the lines that `nvidia-smi` prints while the block runs, all of them at its end; none without it."""
    lines: list[str] = []
    if not shutil.which(ASK[0]):
        yield lines
        return
    first = threading.Event()
    with subprocess.Popen(ASK, stdout=subprocess.PIPE, text=True, env={**os.environ, "LC_ALL": "C"}) as process:

        def read() -> None:
            for line in process.stdout or ():
                lines.append(line)
                first.set()

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        first.wait(FIRST)
        try:
            yield lines
        finally:
            process.terminate()
            reader.join()


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
