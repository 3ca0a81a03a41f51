"""The shell around every command: signals, the run's lease, one-line errors, the exit status."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from apacs_ray.config.command_line import Command
from apacs_ray.distributed.signals import stop_on_signals
from apacs_ray.errors import ApacsError, carried_message
from apacs_ray.redact import printable, redact

if TYPE_CHECKING:
    from apacs_ray.distributed.session import RaySession
    from apacs_ray.runs.run import Run

INTERRUPTED = 130


def run_command(work: Callable[[], int]) -> NoReturn:
    """Do `work`, which returns the exit status, and end the process with it.

    0 is done, 1 failed, 2 wrong usage, 130 stopped by a signal. Errors are one line on stderr; only a defect of this
    package shows a traceback.
    """
    try:
        stop_on_signals()
        _print_whatever_the_terminal_knows()
        status = work()
    except ApacsError as error:
        _say_on_stderr(f"error: {error}")
        status = error.exit_status
    except Exception as error:  # Ray's forms of a worker's error, or a defect of ours  # noqa: BLE001
        message = carried_message(error)
        if message is None:
            _say_on_stderr(traceback.format_exc())
            message = f"{type(error).__name__}, as above; if this is no trouble of your machine, please report it"
        _say_on_stderr(f"error: {message}")
        status = 1
    except KeyboardInterrupt:
        _say_on_stderr("stopped; the same command goes on from here")
        status = INTERRUPTED
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it is closed
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more: the work is done all the same
            stream.flush()
    # trainers that were interrupted leave threads waiting for a Ray that has ended, and so do checks that hang: do not
    # wait for them
    os._exit(status)


@contextmanager
def opened_run(command: Command, what: str | None = None) -> Iterator[tuple[Run, RaySession]]:
    """Hold the run's lease, and a Ray that starts when it is needed, while the block runs; `what` it works on."""
    from apacs_ray.distributed.session import RaySession, prepare_ray

    prepare_ray()  # what the block imports may import Ray
    from apacs_ray.console import print_log, say
    from apacs_ray.runs.run import Run
    from apacs_ray.storage import open_store

    print_log()
    store = open_store(command.output)
    what = what or f"data: {command.data or 'synthetic smears'}"
    say(f"run: {store.uri} ({what})")
    run = Run.open(store, command.settings, command.data)
    ray = RaySession(run)
    failed = True
    try:
        yield run, ray
        failed = False
    finally:
        try:
            ray.stop(failed=failed)
        finally:
            if failed:
                say("not finished: the same command goes on from here")
            run.close()


def _print_whatever_the_terminal_knows() -> None:
    """Let names that a terminal's encoding lacks be escaped, where printing them would end the run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # a pipe that was put in the place of a file is asked where it stands
                stream.reconfigure(errors="backslashreplace")


def _say_on_stderr(text: str) -> None:
    """Print without secrets, and without what would steer a terminal."""
    with contextlib.suppress(OSError, ValueError):
        print(printable(redact(text), lines=True), file=sys.stderr)
