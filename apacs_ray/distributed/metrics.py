"""What a run does, as Prometheus metrics on the endpoint of the node where its driver runs.

`ray_apacs_ray_stage_running{stage}` is 1 while a stage works, `..._rows{stage, what}` what it has done,
`..._rows_per_second{stage, what}` that of the last minute, 0 when it has ended, `..._rejects{stage}` what it refused.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict, deque
from typing import Any

WINDOW = 60.0  # s over which a rate is taken
TELL_EVERY = 5.0  # s
PREFIX = "apacs_ray"  # to which Ray adds its own


class Gauges:
    """Set from the driver. Before `open` (a run starts Ray late, or not at all) values are only remembered."""

    def __init__(self) -> None:
        self._open: dict[str, Any] | None = None
        self._values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._seen: defaultdict[tuple[str, str], deque[tuple[float, int]]] = defaultdict(deque)
        self._mutex = threading.Lock()
        self._closed = threading.Event()

    def open(self) -> None:
        """Once this process has joined Ray. From then on a thread tells, so that a stage that stalls is seen."""
        from ray.util.metrics import Gauge

        kinds = {
            "stage_running": ("1 while the stage works, else 0", ("stage",)),
            "rows": ("tiles (slides, headers, trials: `what`) done by the stage in this run", ("stage", "what")),
            "rows_per_second": (f"of the last {WINDOW:.0f} s", ("stage", "what")),
            "rejects": ("inputs and tiles that the stage refused", ("stage",)),
        }
        self._open = {
            name: Gauge(f"{PREFIX}_{name}", description=text, tag_keys=tags) for name, (text, tags) in kinds.items()
        }
        self.tell()
        threading.Thread(target=self._tell_on, name="gauges", daemon=True).start()

    def close(self) -> None:
        """Before this process leaves Ray."""
        self._closed.set()
        with self._mutex:
            self._open = None

    def running(self, stage: str, *, now: bool) -> None:
        """A stage begins or ends."""
        with self._mutex:
            self._set("stage_running", float(now), stage=stage)
            if not now:
                for key in [key for key in self._seen if key[0] == stage]:
                    del self._seen[key]
                    self._set("rows_per_second", 0.0, stage=stage, what=key[1])

    def rows(self, stage: str, what: str, done: int) -> None:
        """A stage has done so many in all."""
        with self._mutex:
            seen = self._seen[stage, what]
            if seen and done < seen[-1][1]:  # the same name anew: the members of the next fold
                seen.clear()
            seen.append((time.monotonic(), done))
            self._set("rows", done, stage=stage, what=what)
            self._set_rate(stage, what)

    def rejects(self, stage: str, count: int) -> None:
        """A stage refused so many inputs and tiles."""
        with self._mutex:
            self._set("rejects", count, stage=stage)

    def tell(self) -> None:
        """Rates as they are by now, and all values again: Ray loses those set before its agent on this node listens."""
        with self._mutex:
            for stage, what in self._seen:
                self._set_rate(stage, what)
            for (name, tags), value in self._values.items():
                if self._open is not None:
                    self._open[name].set(value, tags=dict(tags))

    def _tell_on(self) -> None:
        while not self._closed.wait(TELL_EVERY):
            self.tell()

    def _set_rate(self, stage: str, what: str) -> None:
        now, seen = time.monotonic(), self._seen[stage, what]
        while len(seen) > 1 and now - seen[1][0] > WINDOW:
            seen.popleft()
        elapsed = now - seen[0][0]
        rate = (seen[-1][1] - seen[0][1]) / elapsed if elapsed else 0.0
        self._set("rows_per_second", rate, stage=stage, what=what)

    def _set(self, name: str, value: float, **tags: str) -> None:
        self._values[name, tuple(tags.items())] = value
        if self._open is not None:
            self._open[name].set(value, tags=tags)
