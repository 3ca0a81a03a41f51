"""How busy GPUs are, by a program that speaks as `nvidia-smi` does: the machine of the tests has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def busy(path: str, tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(ROOT / "benchmarks/busy.py"), "--json", str(tmp_path / "rows.json"), "--", *command]
    return subprocess.run(
        program, env={**os.environ, "PATH": path}, cwd=tmp_path, capture_output=True, text=True, check=False
    )


def test_looks_are_told_by_gpu_and_the_command_s_status_is_kept(tmp_path: Path) -> None:
    speaks = tmp_path / "nvidia-smi"
    told = tmp_path / "told"
    looks = "for busy in 100 50 0; do echo 0, $busy, 2048; echo 1, 0, [N/A]; done"
    speaks.write_text(f"#!/bin/sh\n{looks}\ntouch {told}\nexec sleep 1000\n")
    speaks.chmod(0o755)
    waits = f"while ! test -e {told}; do sleep 0.1; done; exit 3"
    done = busy(f"{tmp_path}:{os.environ['PATH']}", tmp_path, "sh", "-c", waits)
    assert done.returncode == 3, done.stderr
    whole, gpu = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert whole["s"] > 0
    assert gpu == {
        "of": "GPU 0",
        "looks": 3,
        "busy_%": 50.0,
        "looks_idle_%": pytest.approx(100 / 3),
        "GiB_at_most": 2.0,
    }


def test_without_a_gpu_the_command_is_timed(tmp_path: Path) -> None:
    done = busy(str(tmp_path), tmp_path, sys.executable, "-c", "print('it ran')")
    assert done.returncode == 0, done.stderr
    assert "it ran" in done.stdout
    assert "GPU: not measured" in done.stdout
    (whole,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert whole["s"] > 0
