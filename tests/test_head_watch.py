"""The head of a cluster that is gone ends a command in one line."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from apacs_ray.distributed.cluster import head_of, why_unreachable
from apacs_ray.distributed.head_watch import HeadWatch
from apacs_ray.errors import ApacsError

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("address", "place"),
    [("10.0.0.1:6379", ("10.0.0.1", 6379)), ("ray://head:1", ("head", 1)), ("ray://head", ("head", 10001))],
)
def test_an_address_names_its_head(address: str, place: tuple[str, int]) -> None:
    assert head_of(address) == place


@pytest.mark.parametrize("address", ["host", "host:", "host:x", "host:99999", "ray://", ":1"])
def test_an_address_without_a_head_is_told_before_ray_is_asked(address: str) -> None:
    assert "HOST:PORT" in str(why_unreachable(address))


def test_auto_without_a_cluster_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apacs_ray.distributed.cluster.address_of_auto", lambda: None)
    with pytest.raises(ApacsError, match="no cluster was started on this machine"):
        head_of("auto")


def test_a_head_that_answers_is_left_alone_and_one_that_is_gone_stops_the_command() -> None:
    stopped = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as head:
        port = head.getsockname()[1]
        watch = HeadWatch("127.0.0.1", port, stop_command=stopped.set, look_every=0.01, gone_after=0.02)
        assert watch.why_gone() is None
        assert not stopped.wait(0.3)
    assert stopped.wait(20)
    watch.close()
    gone = str(watch.why_gone())
    assert f"the head of the Ray cluster at 127.0.0.1:{port} is gone: nobody answers" in gone
    assert "\n" not in gone


def test_a_command_ends_in_one_line_when_the_head_is_gone(tmp_path: Path) -> None:
    """Whatever the command was at: here it waits, as for a task that will never be done."""
    code = """
        import os, socket, sys, threading
        from functools import partial
        from apacs_ray.commands import shell
        from apacs_ray.config.command_line import parse
        from apacs_ray.distributed import session
        from apacs_ray.distributed.head_watch import HeadWatch
        head = socket.create_server(("127.0.0.1", 0))
        def work():
            with shell.opened_run(parse(["--output", sys.argv[1]], "full.py", "")) as (run, ray):
                ray._started = True
                ray._watch = HeadWatch(*head.getsockname(), look_every=0.05, gone_after=0.1)
                head.close()
                threading.Event().wait()
        shell.run_command(work)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "run")]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the head of the Ray cluster at 127.0.0.1:")
    assert "goes on from here" in done.stdout
    assert not (tmp_path / "run/run.lock").exists()
