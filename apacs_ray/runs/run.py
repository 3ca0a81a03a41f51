"""A run in its `--output`: the lease, which stages are committed, and `run.json`.

A stage's output counts once its marker `<folder>/_committed.json` exists; the marker is one small object, written last,
and names the fingerprint of everything the output depends on. A stage whose marker carries the wanted fingerprint is
not done again.
"""

from __future__ import annotations

import json
import time
from typing import Any

from apacs_ray.config.settings import Settings
from apacs_ray.runs.lease import BEAT_TIMEOUT, Lease
from apacs_ray.runs.markers import MARKER, Marker
from apacs_ray.runs.provenance import FORMAT_VERSION, ROOT, environment, git_commit, source_hash
from apacs_ray.storage import Store

RUN_JSON = "run.json"


class Run:
    """An open run: this process holds its lease."""

    def __init__(self, store: Store, settings: Settings, data: str | None, lease: Lease) -> None:
        self.store = store
        self.settings = settings
        self.data = data
        self.lease = lease
        self.stages: dict[str, dict[str, Any]] = {}
        self.facts: dict[str, Any] = {}
        self._started = time.time()

    @classmethod
    def open(cls, store: Store, settings: Settings, data: str | None) -> Run:
        """Take the run's lease. Raises LeaseHeld."""
        run = cls(store, settings, data, Lease.acquire(store))
        if store.version(RUN_JSON) is not None:
            previous = json.loads(store.read(RUN_JSON))
            run.stages, run.facts = previous.get("stages", {}), previous.get("facts", {})
        return run

    def committed(self, folder: str, fingerprint: str) -> Marker | None:
        """The marker in `folder` when it carries `fingerprint`."""
        marker = self.marker(folder)
        return marker if marker is not None and marker.fingerprint == fingerprint else None

    def marker(self, folder: str) -> Marker | None:
        """The marker in `folder`, whatever its fingerprint."""
        try:
            return Marker.decode(self.store.read(f"{folder}/{MARKER}"))
        except FileNotFoundError:
            return None

    def withdraw(self, folder: str) -> None:
        """Take back a commit, before its output is replaced."""
        self.store.delete(f"{folder}/{MARKER}")

    def commit(self, folder: str, marker: Marker) -> None:
        """Make the output in `folder` count. Refused when the lease is lost or the counts do not add up."""
        marker.counts.reconcile(marker.stage)
        self.lease.check()
        self.store.write(f"{folder}/{MARKER}", marker.encode())

    def record(self, stage: str, **state: Any) -> None:
        """Write a stage's state to `run.json`."""
        self.stages[stage] = {**self.stages.get(stage, {}), **state}
        self.write_record()

    def write_record(self) -> None:
        """Write `run.json`: what a reader needs to judge and repeat this run."""
        self.lease.check()
        record = {
            "format": FORMAT_VERSION,
            "data": self.data,
            "started": self._started,
            "settings": self.settings.model_dump(mode="json"),
            "environment": environment(),
            "source": {"path": str(ROOT), "hash": source_hash(), "git": git_commit()},
            "facts": self.facts,
            "stages": self.stages,
        }
        self.store.write(RUN_JSON, json.dumps(record, indent=1).encode())

    def shorten_timeout(self) -> None:
        """A stage failed: what is still written on the way out is not waited for as long."""
        self.store = self.store.with_timeout(BEAT_TIMEOUT)
        self.lease.shorten_timeout()

    def close(self) -> None:
        self.lease.release()
