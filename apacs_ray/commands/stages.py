"""From a script's command line to a finished or resumable run: lease, stages, summary, exit status."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from apacs_ray.config.command_line import Command, parse
from apacs_ray.errors import ApacsError, carried_message
from apacs_ray.redact import printable, redact

INTERRUPTED = 130


def main(program: str, summary: str, stages: Sequence[str] | None, argv: Sequence[str] | None = None) -> NoReturn:
    """Run `stages` (None: all of them, with the report and the summary) and end the process with its exit status."""
    try:
        command = parse(sys.argv[1:] if argv is None else argv, program, summary)
        status = _run(command, stages)
    except ApacsError as error:
        _tell(f"error: {error}")
        status = error.exit_status
    except Exception as error:  # Ray's forms of a worker's error, or a defect of ours  # noqa: BLE001
        message = carried_message(error)
        if message is None:
            _tell(traceback.format_exc())
            message = f"{type(error).__name__}, as above; if this is no trouble of your machine, please report it"
        _tell(f"error: {message}")
        status = 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        status = INTERRUPTED
    sys.stdout.flush()
    sys.stderr.flush()
    # trainers that were interrupted leave threads waiting for a Ray that has ended: do not wait for them
    os._exit(status)


def _as_ctrl_c(number: int, frame: FrameType | None) -> None:
    """End as by Ctrl-C, also where that is ignored: a script's commands in the background are started so."""
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        raise KeyboardInterrupt
    handler(signal.SIGINT, frame)


def _tell(text: str) -> None:
    """To stderr, without secrets and without what would steer a terminal."""
    print(printable(redact(text), lines=True), file=sys.stderr)


def _run(command: Command, only: Sequence[str] | None) -> int:
    # imported here: --help needs none of this
    from apacs_ray.distributed.session import RaySession, prepare_ray

    prepare_ray()  # the stages import Ray
    from apacs_ray.console import metrics_table, print_log, say, stage_table
    from apacs_ray.runs.run import Run
    from apacs_ray.stages.pipeline import Context, adopt, run_stage
    from apacs_ray.stages.registry import STAGES, read_metrics
    from apacs_ray.storage import open_store

    signal.signal(signal.SIGTERM, _as_ctrl_c)  # `ray job stop` sends it
    print_log()
    store = open_store(command.output)
    say(f"run: {store.uri} (data: {command.data or 'synthetic smears'})")
    run = Run.open(store, command.settings, command.data)
    session = RaySession(run)
    only_looks = command.dry_run or command.estimate
    context = Context(run, session, training=not command.dry_run and only != ("ingest",))
    failed = True
    try:
        if command.dry_run:
            from apacs_ray.commands.dry_run import dry_run

            dry_run(context)
        if command.estimate:
            from apacs_ray.commands.estimate import estimate  # this one imports torch

            estimate(context, only)
        for stage in () if only_looks else STAGES:
            if not stage.wanted(command.settings):
                continue
            if only is None or stage.name in only:
                run_stage(context, stage)
            elif any(name in only for name in _later(stage.name)):
                adopt(context, stage)
        failed = False
    finally:
        session.stop()
        if failed:
            say("not finished: the same command goes on from here")
        run.close()
    if only_looks:
        return 0
    stage_table(run.stages)
    metrics = read_metrics(store) if only is None or "evaluate" in only else None
    if metrics is not None:
        metrics_table(metrics)
        say(f"report: {store.uri_of('evaluation/report.html')}")
    return 0


def _later(name: str) -> list[str]:
    from apacs_ray.stages.registry import STAGES

    names = [stage.name for stage in STAGES]
    return names[names.index(name) + 1 :]
