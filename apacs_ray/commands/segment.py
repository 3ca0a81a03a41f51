"""The command `segment`: masks and objects of whole slides by a trained ensemble."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from apacs_ray.commands.shell import opened_run, run_command
from apacs_ray.config.command_line import Command, SegmentCommand, parse_segment
from apacs_ray.config.settings import Settings

if TYPE_CHECKING:
    from apacs_ray.distributed.session import RaySession
    from apacs_ray.runs.run import Run
    from apacs_ray.stages.segment import Outcome

SUMMARY = "Segment whole slides by a trained ensemble: masks and objects that QuPath opens."


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command, and end the process with its exit status."""
    run_command(partial(_work, sys.argv[1:] if argv is None else argv))


def _work(argv: Sequence[str]) -> int:
    given = parse_segment(argv, "segment.py", SUMMARY)
    if given.dry_run:
        return _dry_run(given)
    if given.estimate:
        return _estimate(given)
    from apacs_ray.console import slides_table

    outcome = segment(given.model, given.slides, given.output, given.settings)
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


def _dry_run(given: SegmentCommand) -> int:
    with _opened(given.slides, given.output, given.settings) as (run, ray):
        from apacs_ray.commands.dry_run_segment import dry_run_segment  # this one imports torch

        dry_run_segment(run, ray, given.model, given.slides)
    return 0


def _estimate(given: SegmentCommand) -> int:
    with _opened(given.slides, given.output, given.settings) as (run, ray):
        from apacs_ray.commands.estimate_segment import estimate_segment  # this one imports torch

        estimate_segment(run, ray, given.model, given.slides)
    return 0


def segment(model: str, slides: str | Sequence[str], output: str, settings: Settings | None = None) -> Outcome:
    """Segment whole slides, as the command `segment` does; `docs/outputs.md` says what is written.

    It starts Ray, or joins the cluster that `RAY_ADDRESS` names, and ends it again.

    Args:
        model: Path or URI of a finished run, or of a folder of models.
        slides: Folders with slides, or single slides.
        output: Where each slide gets a folder.
        settings: Of which `segment`, `data` and `run` count; None: the defaults.

    Returns:
        What became of the slides: `done` holds, by slide, what was found; `rejects` what could not be read.

    Raises:
        UsageError: There are no slides, or the output or the model is none.
        ApacsError: No slide is left, or more are rejected than `data.max_rejects` allows.
    """
    slides = (slides,) if isinstance(slides, str) else tuple(slides)
    with _opened(slides, output, settings or Settings()) as (run, ray):
        from apacs_ray.stages.segment import segment as on_ray

        return on_ray(run, ray, model, slides)


def _opened(slides: Sequence[str], output: str, settings: Settings) -> AbstractContextManager[tuple[Run, RaySession]]:
    return opened_run(Command(None, output, settings), what=f"slides: {', '.join(slides)}")
