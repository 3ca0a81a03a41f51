"""A stage: one step of the pipeline, from typed inputs to a frozen result that its commit marker holds."""

from __future__ import annotations

import contextlib
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import TypeAdapter

from apacs_ray.config.settings import Settings
from apacs_ray.console import Bars, bars, say
from apacs_ray.distributed.session import RaySession
from apacs_ray.errors import ApacsError
from apacs_ray.redact import redact
from apacs_ray.runs.markers import Counts, Marker
from apacs_ray.runs.run import Run
from apacs_ray.storage import Store


@dataclass(frozen=True)
class StageResult:
    """What a stage made. Subclasses add what later stages, the report or `run.json` are to know, as plain values."""

    counts: Counts


R = TypeVar("R", bound=StageResult)
R_co = TypeVar("R_co", bound=StageResult, covariant=True)


@dataclass(frozen=True)
class Committed(Generic[R_co]):
    """A stage whose output in `folder` counts: what later stages take as their input."""

    folder: str
    fingerprint: str
    result: R_co


@dataclass(frozen=True)
class Job:
    """What a stage works with beside its inputs: the run that it is of, Ray, and progress bars."""

    run: Run
    ray: RaySession
    stage: str

    @property
    def store(self) -> Store:
        """Where the run lies."""
        return self.run.store

    @property
    def settings(self) -> Settings:
        """The settings of the run."""
        return self.run.settings

    def progress(self) -> AbstractContextManager[Bars]:
        """Show progress bars while the block runs; Prometheus is told the same."""
        return bars(self.stage, partial(self.ray.metrics.rows, self.stage))


class Stage(ABC, Generic[R]):
    """One step of the pipeline. Subclasses are frozen dataclasses, whose fields are the results they start from.

    Attributes:
        name: As in `run.json` and the summary.
        script: The script in `pipelines/` that does this stage.
        folder: Of its output in the run.
        result_type: The dataclass that `work` returns.
    """

    name: ClassVar[str]
    script: ClassVar[str]
    folder: ClassVar[str]
    result_type: ClassVar[type[StageResult]]

    @property
    def inputs(self) -> dict[str, str]:
        """Fingerprints of the stages that it starts from, by their folders."""
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return {value.folder: value.fingerprint for value in values if isinstance(value, Committed)}

    @abstractmethod
    def fingerprint(self, settings: Settings) -> str:
        """Return the fingerprint of everything that the output depends on."""

    @abstractmethod
    def work(self, job: Job, fingerprint: str) -> R:
        """Make the output in `folder`, and say what it is. Nothing counts before the stage is committed."""

    def holds(self, store: Store, result: R) -> bool:
        """Return whether what a marker with `result` stands for is still there; if not, the stage is done again."""
        return True

    def tidy(self, store: Store, fingerprint: str) -> None:
        """Remove what only the work needed. Called by every command that finds or makes the commit."""


def run_stage(run: Run, ray: RaySession, stage: Stage[R], later: Sequence[str] = ()) -> Committed[R]:
    """Do a stage, unless its output is committed with the same fingerprint.

    Args:
        run: Of which it is.
        ray: For its work.
        stage: With its inputs.
        later: Names of the stages after it, which are outdated when this one is done anew.

    Returns:
        The committed stage.
    """
    fingerprint = stage.fingerprint(run.settings)
    marker = run.committed(stage.folder, fingerprint)
    if marker is not None and not stage.holds(run.store, _decoded(stage, marker).result):
        say(f"{stage.name}: its files are not those that it committed; it is done again")
        marker = None
    if marker is not None:
        run.record(stage.name, state="unchanged", **_record_of(marker))
        stage.tidy(run.store, fingerprint)  # a command that ended after its commit left that to this one
        say(f"{stage.name}: unchanged, not done again")
        return _decoded(stage, marker)
    say(f"{stage.name}: starts")
    ray.metrics.running(stage.name, now=True)
    started = time.time()
    run.record_start(stage.name, later, fingerprint=fingerprint, started=started)
    run.uncommit(stage.folder)
    try:
        result = stage.work(Job(run, ray, stage.name), fingerprint)
    except BaseException as error:
        run.shorten_timeout()
        with contextlib.suppress(ApacsError):  # the store may be what failed; what failed is what is told
            state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
            run.record(stage.name, state=state, error=redact(str(error)))
        raise
    finally:
        ray.metrics.running(stage.name, now=False)
    seconds = round(time.time() - started, 2)
    marker = Marker(
        stage.name,
        fingerprint,
        run.lease.owner,
        started,
        seconds,
        result.counts,
        _encoded(result),
        stage.inputs,
        stage.script,
    )
    run.commit(stage.folder, marker)
    run.record(stage.name, state="done", **_record_of(marker))
    stage.tidy(run.store, fingerprint)
    say(f"{stage.name}: done in {seconds:.1f} s, {_described(result.counts)}")
    return Committed(stage.folder, fingerprint, result)


def delete_others(store: Store, folder: str, ours: re.Pattern[str], current: Collection[str]) -> None:
    """Delete what earlier settings left in a folder: what a run writes there, less what is `current`. All else stays.

    Called before a stage is committed, so that what its marker stands for is all there is.

    Args:
        store: The run.
        folder: Where to look, recursively.
        ours: Matches the paths that a run writes there.
        current: Paths that the stage has just written.
    """
    for entry in list(store.list(folder)):
        if ours.fullmatch(entry.path) and entry.path not in current:
            store.delete(entry.path)


def require_stage(run: Run, stage: Stage[R]) -> Committed[R]:
    """Take over a stage that an earlier command committed.

    Returns:
        Its fingerprint and result.

    Raises:
        ApacsError: naming the script to run first, when it is not committed with these settings.
    """
    marker = run.committed(stage.folder, stage.fingerprint(run.settings))
    if marker is None:
        raise ApacsError(
            f"{run.store.uri}: stage {stage.name} is not done with these settings; "
            f"run python pipelines/{stage.script} with the same options first"
        )
    run.confirm(stage.name)
    return _decoded(stage, marker)


def _encoded(result: StageResult) -> dict[str, Any]:
    """A result as the marker holds it: its counts have a place of their own there."""
    return {name: value for name, value in asdict(result).items() if name != "counts"}


def _decoded(stage: Stage[R], marker: Marker) -> Committed[R]:
    tree = {"counts": asdict(marker.counts), **marker.result}
    result: R = TypeAdapter(stage.result_type).validate_python(tree)  # type: ignore[assignment]
    return Committed(stage.folder, marker.fingerprint, result)


def _record_of(marker: Marker) -> dict[str, Any]:
    """What `run.json` says of a committed stage."""
    return {
        "fingerprint": marker.fingerprint,
        "started": marker.started,
        "seconds": marker.seconds,
        **asdict(marker.counts),
        "result": marker.result,
    }


def _described(counts: Counts) -> str:
    parts = [f"{counts.rows_out} of {counts.rows_in} rows"]
    parts += [f"{count} skipped ({reason})" for reason, count in counts.skipped.items() if count]
    parts += [f"{counts.rejected} rejected"] if counts.rejected else []
    return ", ".join(parts)
