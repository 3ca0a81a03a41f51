"""What a run does, as Prometheus metrics on the endpoint of the node where its driver runs.

`ray_apacs_ray_stage_running{stage}` is 1 while a stage works, `..._rows{stage, what}` what it has done,
`..._rows_per_second{stage, what}` that of the last minute, `..._rejects{stage}` what it refused.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from typing import Any

WINDOW = 60.0  # s over which a rate is taken
PREFIX = "apacs_ray"  # to which Ray adds its own


class Gauges:
    """Set from the driver. Before `open` (a run starts Ray late, or not at all) values are only remembered."""

    def __init__(self) -> None:
        self._open: dict[str, Any] | None = None
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._seen: defaultdict[tuple[str, str], deque[tuple[float, int]]] = defaultdict(deque)

    def open(self) -> None:
        """Once this process has joined Ray."""
        from ray.util.metrics import Gauge

        kinds = {
            "stage_running": ("1 while the stage works, else 0", ("stage",)),
            "rows": ("tiles (slides, headers, trials: `what`) done by the stage in this run", ("stage", "what")),
            "rows_per_second": (f"of the last {WINDOW:.0f} s", ("stage", "what")),
            "rejects": ("inputs that the stage refused", ("stage",)),
        }
        self._open = {
            name: Gauge(f"{PREFIX}_{name}", description=text, tag_keys=tags) for name, (text, tags) in kinds.items()
        }
        self._tell()

    def running(self, stage: str, *, now: bool) -> None:
        """A stage begins or ends."""
        self._set("stage_running", float(now), stage=stage)

    def rows(self, stage: str, what: str, done: int) -> None:
        """A stage has done so many in all."""
        self._tell()
        now = time.monotonic()
        seen = self._seen[stage, what]
        seen.append((now, done))
        while len(seen) > 2 and now - seen[1][0] > WINDOW:
            seen.popleft()
        elapsed = now - seen[0][0]
        self._set("rows", done, stage=stage, what=what)
        self._set("rows_per_second", (done - seen[0][1]) / elapsed if elapsed else 0.0, stage=stage, what=what)

    def rejects(self, stage: str, count: int) -> None:
        """A stage refused so many inputs."""
        self._set("rejects", count, stage=stage)

    def _tell(self) -> None:
        """All values again: Ray loses those that are set before its agent on this node listens."""
        for (name, tags), value in self._values.items():
            if self._open is not None:
                self._open[name].set(value, tags=dict(tags))

    def _set(self, name: str, value: float, **tags: str) -> None:
        self._values[name, tuple(tags.items())] = value
        if self._open is not None:
            self._open[name].set(value, tags=tags)
