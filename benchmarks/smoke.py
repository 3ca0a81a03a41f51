"""Run every benchmark with --smoke, a few at a time, and name those that failed: for CI, after the tests.

Each is a process of its own with a deadline, and must write figures that are finite numbers. Those that can join a Ray
share one. When a benchmark has ended none of its processes may be left: this process adopts whatever descends from it.
With `--jobs` each benchmark has a process like this one, which adopts what is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

from measure import show, start_ray  # noqa: E402

SHARED = ["cutting", "measure", "segmenting", "selection", "smoke", "tiles"]  # modules that are no benchmarks
ON_ONE_RAY = ["tiling", "overhead", "feed", "kills"]
DEADLINE = 300.0  # s for each; on two quiet cores they take some five minutes together
END = 20.0  # s in which a benchmark cleans up after Ctrl-C, and in which what it started may end
ADOPT = 36  # PR_SET_CHILD_SUBREAPER of Linux: orphans below this process become its children


@dataclass(frozen=True)
class Result:
    """A benchmark that has run: why it failed (empty when it did not), its seconds and CPU seconds."""

    name: str
    failure: str
    seconds: float
    cpu: float


def main() -> None:
    """Run the benchmarks, print their times, and exit with 1 when one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="these only")
    parser.add_argument("--json", type=Path, help="write the times there")
    parser.add_argument("--jobs", type=int, default=1, help="benchmarks at a time: half of their time they wait")
    arguments = parser.parse_args()
    benchmarks = {path.stem for path in HERE.glob("*.py")} - set(SHARED)
    names = arguments.names or sorted(benchmarks - set(ON_ONE_RAY)) + ON_ONE_RAY
    if unknown := set(names) - benchmarks:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(sorted(benchmarks))}")
    rows = _in_jobs(names, arguments.jobs) if arguments.jobs > 1 else _in_turn(names)
    total = {name: sum(row[name] for row in rows) for name in ("s", "CPU_s")}
    show("benchmarks, the smallest sizes", [*rows, {"benchmark": "all", **total}], arguments.json)
    if any(row["failure"] != "none" for row in rows):
        raise SystemExit(1)


def _in_turn(names: Sequence[str]) -> list[dict[str, Any]]:
    """Run benchmarks one after the other; return their rows."""
    ctypes.CDLL(None).prctl(ADOPT, 1, 0, 0, 0)
    # a thread a process: several that are waited for by others only slow each other down
    os.environ |= {"OMP_NUM_THREADS": "1"}
    apart = [_run(name, set()) for name in names if name not in ON_ONE_RAY]
    shared = [name for name in names if name in ON_ONE_RAY]
    with _one_ray() if shared else contextlib.nullcontext(set()) as rays:
        results = [*apart, *(_run(name, rays) for name in shared)]
    if shared:
        results.append(Result("the Ray that they share", "", 0.0, _cpu() - sum(result.cpu for result in results)))
    return [{"benchmark": r.name, "s": r.seconds, "CPU_s": r.cpu, "failure": r.failure or "none"} for r in results]


def _in_jobs(names: Sequence[str], jobs: int) -> list[dict[str, Any]]:
    """Run benchmarks in processes of this program, so many at a time; return their rows."""
    groups = [[name] for name in names if name not in ON_ONE_RAY]
    shared = [name for name in names if name in ON_ONE_RAY]

    def run(group: list[str]) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder, "figures.json")
            command = [sys.executable, __file__, *group, "--json", str(figures)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if not figures.exists():
                print(done.stdout, flush=True)
                return [{"benchmark": name, "s": 0.0, "CPU_s": 0.0, "failure": "smoke.py ended"} for name in group]
            rows: list[dict[str, Any]] = json.loads(figures.read_text())["rows"][:-1]
            print(done.stdout.partition("benchmarks, the smallest sizes")[0], end="", flush=True)
            return rows

    with ThreadPoolExecutor(jobs) as pool:
        return [row for rows in pool.map(run, [shared, *groups] if shared else groups) for row in rows]


@contextlib.contextmanager
def _one_ray() -> Iterator[set[int]]:
    """Start a Ray that the benchmarks join; yield its processes."""
    start_ray(2)
    import ray

    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    try:
        yield set(_children()[os.getpid()])
    finally:
        del os.environ["RAY_ADDRESS"]
        ray.shutdown()


def _run(name: str, rays: set[int]) -> Result:
    """Run one benchmark; print its output when it fails."""
    used, began = _cpu(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures, log = Path(folder, "figures.json"), Path(folder, "log")
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, str(HERE / f"{name}.py"), "--smoke", "--json", str(figures)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            failure = "; ".join(filter(None, (_wait(process), _left_behind(rays)))) or _figures_defect(figures)
        if failure:
            print(f"--- {name}: {failure}\n{log.read_text()[-5000:]}\n---", flush=True)
    result = Result(name, failure, time.monotonic() - began, _cpu() - used)
    print(f"{name}: {failure or 'well'}, {result.seconds:.0f} s, {result.cpu:.0f} s of CPU", flush=True)
    return result


def _wait(process: subprocess.Popen[bytes]) -> str:
    """Return why it failed, or nothing. At the deadline it is stopped as by Ctrl-C, so that it ends what it started."""
    try:
        status = process.wait(DEADLINE)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END)
        process.kill()
        process.wait()
        return f"not at its end after {DEADLINE:.0f} s"
    return f"exit status {status}" if status else ""


def _left_behind(rays: set[int]) -> str:
    """Wait for the processes of a benchmark; kill and name those that do not end."""
    deadline = time.monotonic() + END
    while left := _descendants(rays):
        _reap()
        if time.monotonic() > deadline:
            titles = "; ".join(sorted(_title(pid) for pid in left))
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return f"{len(left)} processes are left behind: {titles[:500]}"
        time.sleep(0.1)
    return ""


def _children() -> dict[int, list[int]]:
    """Return the children of every process."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    return children


def _descendants(rays: set[int]) -> set[int]:
    """Return all processes below this one, but the shared Ray's."""
    children, descendants, parents = _children(), set(), [os.getpid()]
    while parents:
        below = [pid for pid in children.get(parents.pop(), []) if pid not in rays]
        descendants.update(below)
        parents += below
    return descendants


def _reap() -> None:
    """Take the status of adopted processes that have ended."""
    for pid in _children().get(os.getpid(), []):
        with contextlib.suppress(ChildProcessError):
            if Path(f"/proc/{pid}/stat").exists():
                os.waitpid(pid, os.WNOHANG)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:80]
    except OSError:
        return str(pid)


def _cpu() -> float:
    """Return the CPU seconds of all processes below this one that have ended, adopted ones too."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _figures_defect(figures: Path) -> str:
    """Return what is wrong with the figures that a benchmark wrote, or nothing."""
    try:
        numbers = list(_numbers(json.loads(figures.read_text())))
    except (OSError, ValueError) as error:
        return f"no figures: {error}"
    bad = [number for number in numbers if not math.isfinite(number)]
    return f"figures that are no finite numbers: {bad}" if bad or not numbers else ""


def _numbers(tree: Any) -> Iterator[float]:
    if isinstance(tree, dict | list):
        for part in tree.values() if isinstance(tree, dict) else tree:
            yield from _numbers(part)
    elif isinstance(tree, int | float):
        yield float(tree)


if __name__ == "__main__":
    main()
