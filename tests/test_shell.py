"""The shell around every command: signals, exit statuses, and terminals that go away or know few letters."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from apacs_ray.testing.runs import wait_for

ROOT = Path(__file__).resolve().parent.parent


def start(code: str, *argv: str, **options: Any) -> subprocess.Popen[str]:
    imports = "from apacs_ray.commands.shell import run_command\nfrom apacs_ray.console import say"
    program = f"{imports}\n{code}\nrun_command(work)"
    return subprocess.Popen(
        [sys.executable, "-c", program, *argv], cwd=ROOT, text=True, stderr=subprocess.PIPE,
        **{"stdout": subprocess.PIPE, **options},
    )  # fmt: skip


SLOW_TO_CLEAN_UP = """
import signal, time
def work():
    try:
        signal.alarm(2)  # as Ray's own handler of SIGTERM arms it
        print("works", flush=True)
        time.sleep(60)
    finally:
        time.sleep(3)
        print("cleaned up", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_stops_a_command_which_takes_its_time_to_clean_up(number: signal.Signals) -> None:
    code = SLOW_TO_CLEAN_UP if number != signal.SIGINT else SLOW_TO_CLEAN_UP.replace("signal.alarm(2)", "0")
    # whatever starts the tests may ignore it, as nohup and a shell's background do
    process = start(code, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    assert process.stdout is not None
    assert process.stdout.readline() == "works\n"
    process.send_signal(number)
    text, errors = process.communicate(timeout=60)
    assert (process.returncode, text) == (130, "cleaned up\n")
    assert errors == "stopped; the same command goes on from here\n"


STARTS_RAY = """
import sys
from apacs_ray.distributed.session import RaySession, prepare_ray
def work():
    prepare_ray()
    from apacs_ray.config.settings import Settings
    from apacs_ray.runs.run import Run
    from apacs_ray.storage import LocalStore
    run = Run.open(LocalStore(sys.argv[1]), Settings(), None)
    try:
        RaySession(run).start()
    finally:
        run.close()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_a_command_while_ray_starts(number: signal.Signals, tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    options = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL), "env": clean}
    process = start(STARTS_RAY, str(tmp_path), **options)
    descendants = psutil.Process(process.pid)
    wait_for(process, lambda: any(child.name() == "gcs_server" for child in descendants.children(recursive=True)))
    assert (tmp_path / "run.lock").exists()
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "stopped; the same command goes on from here\n")
    assert not (tmp_path / "run.lock").exists()


def test_nohup_outlives_its_terminal() -> None:
    code = "import time\ndef work():\n    print('works', flush=True)\n    time.sleep(1)\n    return 0"
    process = start(code, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 0


def test_a_reader_that_goes_away_loses_no_work(tmp_path: Path) -> None:
    code = f"""
def work():
    for number in range(3000):
        say(f"line {{number}}")
    open({str(tmp_path / "done")!r}, "w").close()
    return 0
"""
    process = start(code)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert (tmp_path / "done").exists()


def test_a_closed_output_and_few_letters() -> None:
    code = "def work():\n    say('fïeld \\u4e00')\n    return 0"
    process = start(code, stdout=None, preexec_fn=lambda: os.close(1))
    assert process.wait(timeout=60) == 0
    ascii_only = start(code, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    text, errors = ascii_only.communicate(timeout=60)
    assert (ascii_only.returncode, errors) == (0, "")
    assert "f\\xefeld \\u4e00" in text


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        ("UsageError('no such thing')", 2, "error: no such thing"),
        ("ApacsError('cannot go on')", 1, "error: cannot go on"),
        ("KeyError('tiles')", 1, "error: KeyError, as above; if this is no trouble of your machine, please report it"),
    ],
)
def test_errors_are_one_line_and_an_exit_status(raised: str, status: int, line: str) -> None:
    process = start(f"from apacs_ray.errors import *\ndef work():\n    raise {raised}")
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors.splitlines()[-1] == line
    assert ("Traceback" in errors) == raised.startswith("KeyError")
