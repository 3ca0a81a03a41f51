"""The command `segment`: masks and objects of whole slides by a trained ensemble."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from apacs_ray.commands.shell import opened_run, run_command
from apacs_ray.config.command_line import Command, parse_segment

SUMMARY = "Segment whole slides by a trained ensemble: masks and objects that QuPath opens."


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command, and end the process with its exit status."""
    run_command(partial(_work, sys.argv[1:] if argv is None else argv))


def _work(argv: Sequence[str]) -> int:
    given = parse_segment(argv, "segment.py", SUMMARY)
    with opened_run(Command(None, given.output, given.settings), what=f"slides: {', '.join(given.slides)}") as (
        run,
        ray,
    ):
        from apacs_ray.console import slides_table
        from apacs_ray.stages.segment import segment

        outcome = segment(run, ray, given.model, given.slides)
    rows = [
        {
            "slide": slide,
            "objects": found.objects,
            "cell px": found.pixels,
            "cores": found.cores,
            "readable": f"{found.readable:.1%}" if found.cores else "no tissue",
            "files s": seconds,
        }
        for slide, (found, seconds) in outcome.done.items()
    ]
    slides_table(rows, outcome.unchanged, outcome.rejected_slides)
    return 0
