"""What the benchmarks share: options, ways measured side by side, a table, a JSON file."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from apacs_ray.training.loop import describe_device

Work = Callable[[], object]


def options(description: str, quick: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes; `quick` says what --quick leaves out."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--smoke", action="store_true", help="the smallest sizes at which everything still runs")
    parser.add_argument("--json", type=Path, help="write the figures there")
    return parser


def alternate(ways: Mapping[str, Work], repetitions: int, *, warm: bool = True) -> dict[str, list[float]]:
    """Seconds of each way in each repetition; the ways take turns, so that a slow moment meets all of them.

    With `warm` each way runs once before, unmeasured: what a first call allocates and compiles is not its speed.
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
    """Work in a process of its own: `setup()` makes it there, calls do it there. For what a process is started with."""

    def __init__(self, setup: Callable[[], Work], environment: Mapping[str, str]) -> None:
        before = dict(os.environ)
        os.environ.update(environment)
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self._pool.submit(_set_up, setup).result()
        os.environ.clear()
        os.environ.update(before)

    def __call__(self) -> object:
        return self._pool.submit(_call).result()

    def peak_memory(self) -> int:
        """Bytes at most so far: of GPU memory where there is one, else resident."""
        return self._pool.submit(_peak_memory).result()

    def end(self) -> None:
        """End the process, which holds its memory."""
        self._pool.shutdown()


_work: list[Work] = []


def _set_up(setup: Callable[[], Work]) -> None:
    _work[:] = [setup()]


def _call() -> object:
    result = _work[0]()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each way's repetitions."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def matmul_peak(device: torch.device, dtype: torch.dtype, repetitions: int = 5) -> float:
    """FLOP/s of large matrix products on `device`: what its arithmetic reaches at best."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product() -> None:
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return 2 * side**3 / medians(alternate({"product": product}, repetitions))["product"]


def forward_flops(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> int:
    """Floating-point operations of a forward pass, without doing it."""
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        build()(torch.empty(shape))
    return counter.get_total_flops()


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


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
