"""What a run does, as Prometheus metrics on the endpoint of the node where its driver runs.

`ray_apacs_ray_stage_running{stage}` is 1 while a stage works, else 0. The counters
`ray_apacs_ray_rows_total{stage, what}` and `ray_apacs_ray_rejects_total{stage}` say what it has done and refused;
PromQL gives rates, as in `rate(ray_apacs_ray_rows_total[1m])`.
"""

from __future__ import annotations

import threading
from typing import Any

REPEAT_EVERY = 5.0  # s: Ray forgets a gauge that is not set again
PREFIX = "apacs_ray"  # to which Ray adds its own, and `_total` to counters

Series = tuple[str, tuple[tuple[str, str], ...]]


class RunMetrics:
    """Set from the driver. Before `open` (a run starts Ray late, or not at all) values are only remembered.

    Attributes:
        totals: What each series stands at: name and tags -> value.
    """

    def __init__(self) -> None:
        self.totals: dict[Series, float] = {}
        self._exported: dict[Series, float] = {}
        self._done: dict[Series, int] = {}  # of the present round of work with this name
        self._metrics: dict[str, Any] | None = None
        self._mutex = threading.Lock()
        self._closed = threading.Event()

    def open(self) -> None:
        """Export the metrics; call once this process has joined Ray."""
        from ray.util.metrics import Counter, Gauge

        kinds = {
            "stage_running": (Gauge, "1 while the stage works, else 0", ("stage",)),
            "rows": (
                Counter,
                "tiles (slides, headers, trials: `what`) done by the stage in this run",
                ("stage", "what"),
            ),
            "rejects": (Counter, "inputs and tiles that the stage refused", ("stage",)),
        }
        with self._mutex:
            self._metrics = {
                name: kind(f"{PREFIX}_{name}", description=text, tag_keys=tags)
                for name, (kind, text, tags) in kinds.items()
            }
            for series in self.totals:
                self._export(series)
        threading.Thread(target=self._repeat, name="metrics", daemon=True).start()

    def close(self) -> None:
        """Stop exporting; call before this process leaves Ray."""
        self._closed.set()
        with self._mutex:
            self._metrics = None

    def running(self, stage: str, *, now: bool) -> None:
        """Record that a stage begins or ends."""
        self._set(_series("stage_running", stage=stage), float(now))

    def rows(self, stage: str, what: str, done: int) -> None:
        """Record that a stage has done `done` of `what` in all.

        Fewer than before are of a new round: the members of the next fold have the names of those of the last.
        """
        series = _series("rows", stage=stage, what=what)
        before = self._done.get(series, 0)
        self._done[series] = done
        self._set(series, self.totals.get(series, 0.0) + (done - before if done >= before else done))

    def rejects(self, stage: str, count: int) -> None:
        """Record that a stage refused `count` inputs and tiles in all."""
        self._set(_series("rejects", stage=stage), count)

    def _set(self, series: Series, value: float) -> None:
        with self._mutex:
            self.totals[series] = value
            self._export(series)

    def _export(self, series: Series) -> None:
        name, tags = series
        if self._metrics is None:
            return
        if name == "stage_running":
            self._metrics[name].set(self.totals[series], tags=dict(tags))
        elif (more := self.totals[series] - self._exported.get(series, 0.0)) > 0:
            self._metrics[name].inc(more, tags=dict(tags))
            self._exported[series] = self.totals[series]

    def _repeat(self) -> None:
        while not self._closed.wait(REPEAT_EVERY):
            with self._mutex:
                for series in self.totals:
                    self._export(series)


def _series(name: str, **tags: str) -> Series:
    return name, tuple(tags.items())
