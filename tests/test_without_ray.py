"""Stages where Ray is not installed: nothing imports it, and what they leave is what stages on Ray's workers leave."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from apacs_ray.config.settings import Settings
from apacs_ray.runs.run import Run
from apacs_ray.stages.pipeline import STAGES, run_pipeline
from apacs_ray.storage import LocalStore
from apacs_ray.testing.alone import AloneSession, alone
from apacs_ray.testing.every_write import SETTINGS
from apacs_ray.testing.runs import write_cells

ROOT = Path(__file__).resolve().parent.parent
NAMES = [stage.name for stage in STAGES]
TREE = {**SETTINGS, "fusion": {**SETTINGS["fusion"], "from_best": False}}
PROGRAM = """
import json, sys
sys.modules["ray"] = None  # an import of it fails
from apacs_ray.config.settings import Settings
from apacs_ray.runs.run import Run
from apacs_ray.stages.pipeline import run_pipeline
from apacs_ray.storage import LocalStore
from apacs_ray.testing.alone import AloneSession, without_ray
output, data, settings, names = sys.argv[1:]
run = Run.open(LocalStore(output), Settings.model_validate(json.loads(settings)), data)
with without_ray():
    run_pipeline(run, AloneSession(run), json.loads(names))
run.close()
"""


@pytest.mark.parametrize(
    "path", ["members/fcn8/model.safetensors", "fusion/model.safetensors", "evaluation/metrics.json"]
)
def test_it_leaves_what_workers_of_ray_leave(runs: tuple[Path, Path], path: str) -> None:
    without, on_workers = runs
    assert (without / path).read_bytes() == (on_workers / path).read_bytes()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("without_ray")
    data = str(write_cells(folder / "cells", train=4, test=2))
    without, on_workers = folder / "without", folder / "workers"
    given = [str(without), data, json.dumps(TREE), json.dumps(NAMES)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *given], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = Run.open(LocalStore(str(on_workers)), Settings.model_validate(TREE), data)
    with alone():
        run_pipeline(run, AloneSession(run), NAMES)
    run.close()
    return without, on_workers
