"""The commands that do stages: `full`, `ingest`, `train_members`, `tune_fusion`, `train_fusion`, `evaluate`.

Here are also their two ways of only looking, `--dry-run` and `--estimate`. Nothing heavy is imported before the command
line is read, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from apacs_ray.commands.shell import opened_run, run_command
from apacs_ray.config.command_line import SECTIONS as SETTINGS
from apacs_ray.config.command_line import Command, parse

SUMMARIES = {
    "full.py": "The whole pipeline: data, members, heatmaps, sweep, fusion, evaluation, report.",
    "ingest.py": "Cut images and masks into tile shards.",
    "train_members.py": "Train FCN-32, FCN-16 and FCN-8.",
    "tune_fusion.py": "Store the members' heatmaps and sweep the fusion's hyperparameters.",
    "train_fusion.py": "Train the fusion network.",
    "evaluate.py": "Evaluate all models on the test tiles and write the report.",
}

# what their --help shows of the settings: the sections that their stages read
SECTIONS = {
    "full.py": tuple(section for section in SETTINGS if section != "segment"),
    "ingest.py": ("data", "synthetic", "tiles", "run"),
    "train_members.py": ("members", "run"),
    "tune_fusion.py": ("members", "heatmaps", "tune", "fusion", "evaluate", "run"),
    "train_fusion.py": ("fusion", "run"),
    "evaluate.py": ("fusion", "evaluate", "run"),
}


def main(script: str, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a script of `pipelines/` by its file's name, and end the process with its exit status."""
    run_command(partial(_work, script, sys.argv[1:] if argv is None else argv))


def _work(script: str, argv: Sequence[str]) -> int:
    command = parse(argv, script, SUMMARIES[script], SECTIONS[script])
    if command.dry_run:
        return _dry_run(command)
    if command.estimate:
        return _estimate(command, script)
    return _run(command, script)


def _run(command: Command, script: str) -> int:
    with opened_run(command) as (run, ray):
        from apacs_ray.console import metrics_table, say, stage_table
        from apacs_ray.stages.pipeline import read_metrics, run_pipeline, stages_of

        names = stages_of(script)
        run_pipeline(run, ray, names)
    stage_table(run.stages)
    if "evaluate" in names:
        metrics_table(read_metrics(run.store))
        say(f"report: {run.store.uri_of('evaluation/report.html')}")
    return 0


def _dry_run(command: Command) -> int:
    with opened_run(command) as (run, ray):
        from apacs_ray.commands.dry_run import dry_run

        dry_run(run, ray)
    return 0


def _estimate(command: Command, script: str) -> int:
    with opened_run(command) as (run, ray):
        from apacs_ray.commands.estimate import estimate  # this one imports torch
        from apacs_ray.stages.pipeline import stages_of

        estimate(run, ray, stages_of(script))
    return 0
