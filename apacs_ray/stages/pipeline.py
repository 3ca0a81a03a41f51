"""What every stage has in common: reuse by fingerprint, progress lines, commit, and the order of the stages."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from apacs_ray.config.settings import Settings
from apacs_ray.console import Bars, bars, say
from apacs_ray.distributed.session import RaySession
from apacs_ray.errors import ApacsError
from apacs_ray.redact import redact
from apacs_ray.runs.markers import Counts, Marker
from apacs_ray.runs.run import Run
from apacs_ray.storage import Entry, Store


@dataclass
class Context:
    """What a stage works with: the run, Ray, what is to come, and the committed stages before it."""

    run: Run
    ray: RaySession
    training: bool = True  # whether stages after ingest will follow
    markers: dict[str, Marker] = field(default_factory=dict)
    stage: str = ""  # that works now
    _listings: dict[str, list[Entry]] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        return self.run.settings

    def bars(self) -> AbstractContextManager[Bars]:
        """Progress bars of the stage that works now, which Prometheus hears of, too."""
        return bars(self.stage, partial(self.ray.gauges.rows, self.stage))

    def listed(self, store: Store) -> list[Entry]:
        """All objects of a store, listed once: what is cut is what the fingerprint saw."""
        if store.uri not in self._listings:
            self._listings[store.uri] = list(store.list())
        return self._listings[store.uri]

    def done(self, stage: str) -> Marker:
        """The marker of a stage that must come first. Raises ApacsError naming the command."""
        if stage not in self.markers:
            raise ApacsError(
                f"{self.run.store.uri}: stage {stage} is not done with these settings; "
                f"run python pipelines/{STAGE_SCRIPTS[stage]} with the same options first"
            )
        return self.markers[stage]


STAGE_SCRIPTS = {
    "ingest": "ingest.py",
    "train_members": "train_members.py",
    "heatmaps": "tune_fusion.py",
    "tune_fusion": "tune_fusion.py",
    "train_fusion": "train_fusion.py",
    "evaluate": "evaluate.py",
}


@dataclass(frozen=True)
class Outcome:
    """What a stage made, before it is committed. `after` runs once the commit stands (tidying only)."""

    counts: Counts
    info: dict[str, Any] = field(default_factory=dict)
    after: Callable[[], None] | None = None


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline: the folder it writes, what its output depends on, and the work itself."""

    name: str
    folder: str
    fingerprint: Callable[[Context], str]
    work: Callable[[Context, str], Outcome]
    wanted: Callable[[Settings], bool] = lambda settings: True


def run_stage(context: Context, stage: Stage) -> None:
    """Do a stage unless its output is committed with the same fingerprint."""
    run = context.run
    fingerprint = stage.fingerprint(context)
    marker = run.committed(stage.folder, fingerprint)
    if marker is not None:
        context.markers[stage.name] = marker
        run.record(stage.name, state="unchanged", **_summary(marker))
        say(f"{stage.name}: unchanged, not done again")
        return
    say(f"{stage.name}: starts")
    context.stage = stage.name
    context.ray.gauges.running(stage.name, now=True)
    started = time.time()
    run.record(stage.name, state="running", fingerprint=fingerprint, started=started)
    run.withdraw(stage.folder)
    try:
        outcome = stage.work(context, fingerprint)
    except BaseException as error:
        run.shorten_timeout()
        with contextlib.suppress(ApacsError):  # the store may be what failed; what failed is what is told
            run.record(
                stage.name,
                state="stopped" if isinstance(error, KeyboardInterrupt) else "failed",
                error=redact(str(error)),
            )
        raise
    finally:
        context.ray.gauges.running(stage.name, now=False)
    seconds = round(time.time() - started, 2)
    marker = Marker(stage.name, fingerprint, run.lease.owner, started, seconds, outcome.counts, outcome.info)
    run.commit(stage.folder, marker)
    context.markers[stage.name] = marker
    run.record(stage.name, state="done", error=None, **_summary(marker))
    if outcome.after is not None:
        outcome.after()
    counts = outcome.counts
    lost = "".join(f", {count} skipped ({reason})" for reason, count in counts.skipped.items() if count)
    lost += f", {counts.rejected} rejected" if counts.rejected else ""
    say(f"{stage.name}: done in {seconds:.1f} s, {counts.rows_out} of {counts.rows_in} rows{lost}")


def adopt(context: Context, stage: Stage) -> None:
    """Take over a stage that an earlier command committed, for a script that starts in the middle."""
    marker = context.run.committed(stage.folder, stage.fingerprint(context))
    if marker is None:
        context.done(stage.name)
    else:
        context.markers[stage.name] = marker


def _summary(marker: Marker) -> dict[str, Any]:
    counts = asdict(marker.counts)
    return {"fingerprint": marker.fingerprint, "started": marker.started, "seconds": marker.seconds, **counts}
