"""What a person reads of an error that came through Ray."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from apacs_ray.errors import ApacsError, carried_message, message_of

ROOT = Path(__file__).resolve().parent.parent


def chained(*errors: BaseException) -> BaseException:
    """The first error, that followed from the second, and so on."""
    for outer, inner in itertools.pairwise(errors):
        outer.__cause__ = inner
    return errors[0]


CARRIED = "Traceback\n  File x\napacs_ray.errors.ApacsError: the line\n\nThe above\n[36mray::f()[39m\nUDF failed"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(CARRIED),
        chained(RuntimeError(CARRIED), SystemError()),  # an actor's start, as Ray Data raises it
        chained(RuntimeError("outer"), RuntimeError(CARRIED)),
        chained(RuntimeError("outer"), ApacsError("the line"), ValueError("what it followed from")),
    ],
)
def test_the_line_is_found_wherever_in_the_chain_it_stands(error: BaseException) -> None:
    assert carried_message(error) == message_of(error) == "the line"


def test_another_error_is_its_last_line() -> None:
    assert carried_message(ValueError("a\nb")) is None
    assert message_of(chained(RuntimeError("outer"), ValueError("a\nb"))) == "b"
    assert message_of(chained(RuntimeError("outer"), ValueError())) == "ValueError()"


def test_a_source_that_changes_during_the_run_ends_it_in_one_line(tmp_path: Path) -> None:
    """In every kind of worker: in a pool of actors Ray tells it as the death of one."""
    code = """
        import sys
        from pathlib import Path
        from unittest import mock
        import pyarrow as pa
        from apacs_ray.distributed.session import RaySession, prepare_ray
        prepare_ray()
        from apacs_ray.commands.shell import run_command
        from apacs_ray.distributed.tasks import PoolPlan, map_blocks, map_shards, run_in_task
        from apacs_ray.errors import message_of
        from apacs_ray.runs.provenance import ROOT, source_hash
        from apacs_ray.storage import open_store
        source_hash()
        RaySession(mock.Mock(store=open_store(sys.argv[1]), data=None)).start()
        (ROOT / "apacs_ray/redact.py").open("a").write("# changed")
        block = pa.table({"a": [1]})
        ways = (
            lambda: run_in_task(lambda: 1, cpus=1, gpus=0),
            lambda: list(map_blocks(lambda block: block, [block])),
            lambda: list(map_shards(lambda: lambda path: block, ["x"], PoolPlan(1, 1.0, 0.0))),
        )
        def work():
            for way in ways[:2]:
                try:
                    way()
                except Exception as error:
                    print("told:", message_of(error))
            ways[2]()
        run_command(work)
    """
    copy = tmp_path / "copy"
    for path in (ROOT / "apacs_ray").rglob("*.py"):
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "run")]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        command, cwd=copy, env={**environment, "PYTHONPATH": str(copy)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    words = "a worker runs another source of apacs_ray"
    told = [line for line in done.stdout.splitlines() if line.startswith("told:")]
    assert [words in line for line in told] == [True, True], done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {words}")
    assert "Traceback" not in done.stdout  # Ray prints what an actor raises at its start
