"""What a log file, which is no terminal, is told of a long stage."""

from __future__ import annotations

import pytest
from rich.progress import Progress

from apacs_ray.console import LOOK_EVERY, PROGRESS_EVERY, Bars, console

HOUR = 3600


class Clock:
    """A clock that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bars(clock: Clock) -> Bars:
    return Bars(Progress(console=console, disable=True), "train_members", lambda name, rows: None, clock)


def lines(bars: Bars, clock: Clock, seconds: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is printed in the next seconds, without the time of day."""
    for _ in range(int(seconds / LOOK_EVERY)):
        clock.now += LOOK_EVERY
        bars.look()
    return [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()]


def test_a_stage_that_waits_says_so_every_minute(bars: Bars, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    printed = lines(bars, clock, HOUR, capsys)
    assert 60 <= len(printed) <= 61
    assert printed[0] == "train_members: at work for 59 s"
    assert printed[-1].startswith("train_members: at work for 1 h 0 min")


def test_a_line_says_how_far_how_fast_and_what_is_left(
    bars: Bars, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bars.show("fcn8", 10, 100, "val Dice 0.5000")
    clock.now += PROGRESS_EVERY + 61
    bars.show("fcn8", 20, 100, "val Dice 0.6000")
    bars.show("fcn16", 100, 100)  # has ended
    bars.show("fcn32", 1, 100)  # its rate is not known yet
    assert lines(bars, clock, 1, capsys) == [
        "train_members: fcn8 20 of 100, val Dice 0.6000, 5.0 a minute, about 16 min left; fcn32 1 of 100"
    ]
    assert lines(bars, clock, 50, capsys) == []  # not more often than needed
    bars.show("fcn8", 1, 100)  # of the next fold
    clock.now += 9
    bars.show("fcn8", 51, 100)
    assert lines(bars, clock, 1, capsys)[0].startswith("train_members: fcn8 51 of 100, 5.0 a second, about 10 s left;")


def test_work_that_hangs_is_told_as_long_as_it_hangs(
    bars: Bars, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    bars.show("tiles", 7, 9)
    printed = lines(bars, clock, 600, capsys)
    assert printed == ["train_members: tiles 7 of 9"] * 10
    bars.show("tiles", 9, 9)
    assert lines(bars, clock, 60, capsys) == ["train_members: at work for 11 min"]
