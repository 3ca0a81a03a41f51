"""The terminal of a run: lines, log records as such lines, progress bars and the tables at the end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from apacs_ray.redact import printable, redact

LOOK_EVERY = 1.0  # s
PROGRESS_EVERY = 60.0 - LOOK_EVERY  # s between lines of progress where there is no terminal, at least
LOGGER = "apacs_ray"  # above the loggers of all our modules


class _Console(Console):
    """A console whose reader may go away, as `head` does: the run goes on without one."""

    def on_broken_pipe(self) -> None:
        """Print nothing more. Rich itself would end the process."""
        self.quiet = True


console = _Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print one line with the time: no markup, secrets and control characters redacted."""
    try:
        console.print(f"{time.strftime('%H:%M:%S')} {printable(redact(text))}", markup=False)
    except OSError:  # the terminal is gone, or the disk that a log is written to is full
        console.quiet = True


class _Lines(logging.Handler):
    """Prints each record as `say` does, the traceback in the same line."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(self.format(record))
        except Exception:  # logging's own way with a record that cannot be formatted  # noqa: BLE001
            self.handleError(record)


def print_log() -> None:
    """Print what our modules log from now on, redacted, as lines of this process; more calls change nothing.

    The driver calls this. Worker processes do not: what they log goes to Ray's files.
    """
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(handler, _Lines) for handler in logger.handlers):
        logger.addHandler(_Lines(logging.INFO))
        logger.setLevel(logging.INFO)
        logger.propagate = False  # a handler of the root logger would print the record again, with its secrets


def cell(value: object) -> Text:
    """Return a table's cell, in which a file's name is no markup and steers no terminal."""
    return Text(printable(redact(str(value))))


@dataclass
class _Bar:
    """How far a named piece of work is, and how far it was when it was first told of."""

    task: TaskID
    began: float  # s, of the clock
    at_begin: int
    done: int
    total: int
    note: str = ""

    def describe(self, name: str, now: float) -> str:
        """What is done of what, how fast, and what is left, in words."""
        seconds, gained = now - self.began, self.done - self.at_begin
        words = [f"{name} {self.done} of {self.total}", *filter(None, [self.note])]
        if gained > 0 and seconds > 0:
            rate = gained / seconds
            words += [f"{rate:.1f} a second" if rate >= 1 else f"{rate * 60:.1f} a minute" if rate * 60 >= 1 else ""]
            words += [f"about {_duration((self.total - self.done) / rate)} left"]
        return ", ".join(filter(None, words))


class Bars:
    """Named progress bars; where there is no terminal, a line every `PROGRESS_EVERY` seconds, whatever happens."""

    def __init__(
        self,
        progress: Progress,
        stage: str,
        on_progress: Callable[[str, int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._progress, self._stage, self._on_progress, self._clock = progress, stage, on_progress, clock
        self._bars: dict[str, _Bar] = {}
        self._began = self._printed = clock()

    def show(self, name: str, done: int, total: int, note: str = "", *, rows: int | None = None) -> None:
        """Move a bar.

        Args:
            name: The bar's name; a new one makes a bar.
            done: How far it is, in the units of `total`.
            total: Where it ends.
            note: A few words beside it.
            rows: What `done` is in tiles, where the bar counts something else.
        """
        self._on_progress(name, done if rows is None else rows)
        bar = self._bars.get(name)
        if bar is None:
            task = self._progress.add_task(name, total=total, note=note)
            bar = self._bars[name] = _Bar(task, self._clock(), done, done, total)
        if done < bar.done:  # of a new round, as the members of the next fold
            bar.began, bar.at_begin = self._clock(), done
        bar.done, bar.total, bar.note = done, total, note
        self._progress.update(bar.task, completed=done, total=total, note=note)

    def look(self) -> None:
        """Print a line where none was for a while: how far each bar is, or how long the stage has waited."""
        now = self._clock()
        if now - self._printed < PROGRESS_EVERY:
            return
        self._printed = now
        moving = [bar.describe(name, now) for name, bar in list(self._bars.items()) if bar.done < bar.total]
        waits = f"at work for {_duration(now - self._began)}"
        say(f"{self._stage}: {'; '.join(moving) if moving else waits}")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def bars(stage: str, on_progress: Callable[[str, int], None]) -> Iterator[Bars]:
    """Show progress bars of a stage while the block runs; `on_progress` is called with a bar's name and rows done."""
    columns = (
        TextColumn("         {task.description}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    ended = threading.Event()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        shown = Bars(progress, stage, on_progress)

        def look_on() -> None:  # a stage that waits calls nobody
            while not ended.wait(LOOK_EVERY):
                shown.look()

        if progress.disable:
            threading.Thread(target=look_on, name="progress", daemon=True).start()
        try:
            yield shown
        finally:
            ended.set()


def slides_table(rows: Sequence[Mapping[str, Any]], unchanged: int, rejected: int) -> None:
    """Print what was found in each slide that was segmented, and what became of the others."""
    table = Table(title="slides", title_justify="left", caption=f"{unchanged} unchanged, {rejected} rejected")
    for heading in ("slide", "objects", "cell px", "cores", "readable", "files s"):
        table.add_column(heading, justify="left" if heading == "slide" else "right")
    for row in rows:
        table.add_row(*(cell(value) for value in row.values()))
    console.print(table)


def stage_table(stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the final summary: the seconds of each stage and what became of its rows."""
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
    """Print the pooled figures of every model over the test tiles, from `metrics.json`."""
    table = Table(title="test tiles", title_justify="left")
    for heading in ("model", "Dice", "95 % CI", "IoU", "accuracy", "boundary IoU"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, row in metrics.items():
        interval = row["dice_ci95"]
        span = f"{interval[0]:.4f} - {interval[1]:.4f}" if interval else "-"
        ratios = [row["dice"], row["iou"], row["accuracy"], row["boundary_iou"]]
        dice, *others = ("-" if value is None else f"{value:.4f}" for value in ratios)
        table.add_row(name, dice, span, *others)
    console.print(table)
