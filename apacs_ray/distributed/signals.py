"""Signals that ask a command to stop: SIGTERM (`ray job stop`, Slurm, Kubernetes) and SIGHUP end it as Ctrl-C does."""

from __future__ import annotations

import signal
from types import FrameType


def stop_on_signals() -> None:
    """Install the handlers. To be called again after `ray.init`, which puts its own in their place.

    Ray's handler of SIGTERM arms an alarm that aborts the process after 3 s, in which a run cannot clean up.
    """
    signal.signal(signal.SIGTERM, _as_ctrl_c)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # which nohup sets: such a command outlives its terminal
        signal.signal(signal.SIGHUP, _as_ctrl_c)


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """End as by Ctrl-C, also where that is ignored: a script's commands in the background are started so."""
    signal.alarm(0)
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)
