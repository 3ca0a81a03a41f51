"""Parts of every benchmark: options, ways measured side by side, the table, the JSON file."""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # a benchmark without networks does not wait for torch
    import torch
    from torch import nn

Work = Callable[[], object]


def options(description: str, quick: str) -> argparse.ArgumentParser:
    """Make a parser with the options of every benchmark; `quick` is the help of --quick."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes at which everything still runs")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser


def require(condition: object, message: str) -> None:
    """End the program with `message` unless the condition holds: something else was measured than was meant."""
    if not condition:
        raise SystemExit(message)


def start_ray(cpus: int | None = None) -> None:
    """Join the Ray of RAY_ADDRESS, or start one of this process's own."""
    from apacs_ray.distributed.session import prepare_ray

    prepare_ray()  # first: Ray reads its token when it is imported
    import ray

    address = os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {"address": address} if address else {"address": "local", "num_cpus": cpus}
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR", **own)


def alternate(ways: Mapping[str, Work], repetitions: int, *, warm: bool = True) -> dict[str, list[float]]:
    """Measure ways of doing the same work; they take turns, so that a slow moment of the machine meets all of them.

    Args:
        ways: Name -> work.
        repetitions: Measured calls of each.
        warm: Call each once before, unmeasured: what a first call allocates and compiles is not its speed.

    Returns:
        Name -> seconds of each repetition.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(-int(warm), repetitions):
        for name, work in ways.items():
            started = time.perf_counter()
            work()
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - started)
    return seconds


class Elsewhere:
    """Work in a process of its own with an environment of its own: `setup()` prepares it there, calls do it there."""

    def __init__(self, setup: Callable[[], Work], environment: Mapping[str, str]) -> None:
        before = dict(os.environ)
        os.environ.update(environment)
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._ready = self._pool.submit(_set_up, setup)  # starts the process; several set up at the same time
        os.environ.clear()
        os.environ.update(before)

    def __call__(self) -> object:
        """Do the work once and return its result."""
        self._ready.result()
        return self._pool.submit(_call).result()

    def peak_memory(self) -> int:
        """Return the peak in bytes so far: of GPU memory where there is a GPU, else resident."""
        return self._pool.submit(_peak_memory).result()

    def end(self) -> None:
        """End the process, which holds its memory."""
        self._pool.shutdown()


_work: list[Work] = []


def _set_up(setup: Callable[[], Work]) -> None:
    _work[:] = [setup()]


def _call() -> object:
    import torch

    result = _work[0]()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def _peak_memory() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_resident() -> float:
    """Return this process's peak resident memory in MB."""
    # not ru_maxrss, which a process inherits from the one that started it
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median of each way's repetitions."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def matmul_peak(device: torch.device, dtype: torch.dtype, *, smoke: bool = False) -> float:
    """Measure matrix products: what the arithmetic of a device reaches at best.

    Args:
        device: Where they are computed.
        dtype: Of the matrices.
        smoke: Use small ones: a CPU without bfloat16 takes minutes for a large product of it.

    Returns:
        FLOP/s.
    """
    import torch

    side, repetitions = (128, 1) if smoke else (8192 if device.type == "cuda" else 2048, 5)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return 2 * side**3 / medians(alternate({"product": product}, repetitions))["product"]


def forward_flops(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> int:
    """Count the floating-point operations of a forward pass without doing it."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        build()(torch.empty(shape))
    return counter.get_total_flops()


def machine() -> dict[str, Any]:
    """Return what the figures depend on: device, threads and versions."""
    torch = sys.modules.get("torch")  # a benchmark without networks does not wait for it
    versions: dict[str, Any] = {"python": platform.python_version(), "cores": os.cpu_count()}
    if torch is None:
        return {"device": processor(), **versions}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {"device": device, "threads": torch.get_num_threads(), "torch": torch.__version__, **versions}


def processor() -> str:
    """Return the name of this machine's CPU; where Linux does not know it, the architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU, {line.partition(':')[2].strip()}"
    return f"CPU, {platform.machine()}"


def show(title: str, rows: list[dict[str, Any]], path: Path | None) -> None:
    """Print rows as a table, and write them with the machine as JSON."""
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(name for row in rows for name in row if not isinstance(row[name], dict | list)))
    for name in columns:
        table.add_column(name.replace("_", " "), justify="left" if name == columns[0] else "right")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    Console(width=160).print(table)
    if path is not None:
        path.write_text(json.dumps({"title": title, "machine": machine(), "rows": rows}, indent=1))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
