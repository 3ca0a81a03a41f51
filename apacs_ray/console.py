"""What a person watching a run sees: a line a stage, progress bars on a terminal, a table at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from apacs_ray.redact import printable, redact

SAY_EVERY = 60.0  # s between lines of progress where there is no terminal
console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line, as it is (no markup), less what no terminal should get."""
    console.print(f"{time.strftime('%H:%M:%S')} {printable(redact(text))}", markup=False)


def cell(value: object) -> Text:
    """A table's cell: a name of a file in it is no markup and steers no terminal."""
    return Text(printable(redact(str(value))))


class Bars:
    """Named progress bars; on anything but a terminal a line for each, now and then."""

    def __init__(self, progress: Progress, stage: str, heard: Callable[[str, int], None]) -> None:
        self._progress, self._stage, self._heard = progress, stage, heard
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, tuple[float, int]] = {}

    def show(self, name: str, done: int, total: int, note: str = "", *, rows: int | None = None) -> None:
        """Move bar `name` to `done` of `total`. `rows`: what that is in tiles, where it counts something else."""
        self._heard(name, done if rows is None else rows)
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, note=note)
        self._progress.update(self._tasks[name], completed=done, total=total, note=note)
        now = time.monotonic()
        said, what = self._said.setdefault(name, (now, done))
        if self._progress.disable and now - said >= SAY_EVERY and done != what and done < total:
            self._said[name] = (now, done)
            say(f"{self._stage}: {name} {done} of {total}{f', {note}' if note else ''}")


@contextmanager
def bars(stage: str, heard: Callable[[str, int], None]) -> Iterator[Bars]:
    """Progress bars of a stage while the block runs; `heard` is told the rows done of each."""
    columns = (
        TextColumn("         {task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bars(progress, stage, heard)


def stage_table(stages: Mapping[str, Mapping[str, Any]]) -> None:
    """The final summary: what each stage took and what became of its rows."""
    table = Table(title="stages", title_justify="left")
    for heading in ("stage", "state", "seconds", "rows in", "rows out", "skipped", "rejected"):
        table.add_column(heading, justify="left" if heading in ("stage", "state", "skipped") else "right")
    for name, stage in stages.items():
        skipped = ", ".join(f"{reason} {count}" for reason, count in stage.get("skipped", {}).items() if count)
        seconds = f"{stage['seconds']:.1f}" if "seconds" in stage else ""
        cells = (
            stage.get("rows_in", ""),
            stage.get("rows_out", ""),
            skipped or "0",
            stage.get("rejected", ""),
        )
        table.add_row(cell(name), cell(stage.get("state", "")), seconds, *map(cell, cells))
    console.print(table)


def metrics_table(metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Pooled figures of every model over the test tiles."""
    table = Table(title="test tiles", title_justify="left")
    for heading in ("model", "Dice", "95 % CI", "IoU", "accuracy", "boundary IoU"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, row in metrics.items():
        interval = row["dice_ci95"]
        shown = f"{interval[0]:.4f} - {interval[1]:.4f}" if interval else "-"
        ratios = [row["dice"], row["iou"], row["accuracy"], row["boundary_iou"]]
        dice, *others = ("-" if value is None else f"{value:.4f}" for value in ratios)
        table.add_row(name, dice, shown, *others)
    console.print(table)
