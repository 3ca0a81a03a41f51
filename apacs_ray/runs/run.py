"""A run in its `--output`: the lease, which stages are committed, and `run.json`.

A stage's output counts once its marker `<folder>/_committed.json` exists; the marker is one small object, written last,
and names the fingerprint of everything the output depends on. A stage whose marker carries the wanted fingerprint is
not done again.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from apacs_ray.config.settings import Settings
from apacs_ray.errors import UsageError
from apacs_ray.runs.lease import BEAT_TIMEOUT, Lease
from apacs_ray.runs.markers import MARKER, Marker, read_marker
from apacs_ray.runs.provenance import FORMAT_VERSION, ROOT, environment, git_commit, source_hash
from apacs_ray.storage import Store

RUN_JSON = "run.json"
CLAIMS = ("done", "unchanged")  # states by which a stage is what the settings in `run.json` say
EARLIER = "earlier"  # the state of a stage that was done with other settings, and was not looked at since
log = logging.getLogger(__name__)


class Run:
    """An open run: this process holds its lease."""

    def __init__(self, store: Store, settings: Settings, data: str | None, lease: Lease) -> None:
        self.store = store
        self.settings = settings
        self.data = data
        self.lease = lease
        self.stages: dict[str, dict[str, Any]] = {}
        self._started = time.time()

    @classmethod
    def open(cls, store: Store, settings: Settings, data: str | None) -> Run:
        """Take the run's lease.

        Returns:
            The open run; close it.

        Raises:
            LeaseHeld: when another process writes this run.
            UsageError: when the run there is of other data, and `run.replace` is not set.
        """
        run = cls(store, settings, data, Lease.acquire(store))
        try:
            run._go_on()
        except BaseException:  # also a signal: who has not opened a run does not close it
            run.close()
            raise
        return run

    def _go_on(self) -> None:
        """Take over what earlier commands recorded. Raises UsageError when it is of other data."""
        record = self._earlier_record()
        self.stages = dict(record.get("stages", {}))
        earlier = record.get("data")
        if self.stages and not self.settings.run.replace and _place(earlier) != _place(self.data):
            there, given = earlier or "synthetic smears", self.data or "synthetic smears"
            raise UsageError(
                f"{self.store.uri}: holds a run of {there}, not of {given}; choose another --output, or give "
                "--run.replace true to have it replaced"
            )
        if record.get("settings") != _as_json(self.settings):
            # `run.json` will name these settings: what was done with others is no claim until it is found to hold
            for name, stage in self.stages.items():
                self.stages[name] = {**stage, "state": EARLIER if stage.get("state") in CLAIMS else stage.get("state")}

    def committed(self, folder: str, fingerprint: str) -> Marker | None:
        """Return the marker in `folder` when it carries `fingerprint`."""
        marker = read_marker(self.store, folder)
        return marker if marker is not None and marker.fingerprint == fingerprint else None

    def uncommit(self, folder: str) -> None:
        """Take back a commit, before its output is replaced."""
        self.store.delete(f"{folder}/{MARKER}")

    def commit(self, folder: str, marker: Marker) -> None:
        """Make the output in `folder` count.

        Raises:
            ApacsError: when the lease is lost or the counts do not add up.
        """
        marker.counts.reconcile(marker.stage)
        self.lease.check()
        self.store.write(f"{folder}/{MARKER}", marker.encode())

    def confirm(self, stage: str) -> None:
        """Note that what an earlier command recorded of a stage holds with these settings, too."""
        if self.stages.get(stage, {}).get("state") == EARLIER:
            self.stages[stage]["state"] = "unchanged"

    def record_start(self, stage: str, later: Sequence[str], **state: Any) -> None:
        """Write to `run.json` that a stage works: what is recorded of it and of those after it no longer holds."""
        self.stages[stage] = {"state": "running", **state}
        for name in self.stages.keys() & set(later):
            self.stages[name] = {**self.stages[name], "state": "outdated"}
        self.write_record()

    def record(self, stage: str, **state: Any) -> None:
        """Write a stage's state to `run.json`, beside what is recorded of it."""
        self.stages[stage] = {**self.stages.get(stage, {}), **state}
        self.write_record()

    def write_record(self) -> None:
        """Write `run.json`: what a reader needs to judge and repeat this run."""
        self.lease.check()
        record = {
            "format": FORMAT_VERSION,
            "data": _place(self.data),
            "started": self._started,
            "settings": _as_json(self.settings),
            "environment": environment(),
            "source": {"path": str(ROOT), "hash": source_hash(), "git": git_commit()},
            "stages": self.stages,
        }
        self.store.write(RUN_JSON, json.dumps(record, indent=1, allow_nan=False).encode())

    def shorten_timeout(self) -> None:
        """Wait for a store in trouble no longer than a heartbeat does: a stage failed, and this run ends."""
        self.store = self.store.with_timeout(BEAT_TIMEOUT)
        self.lease.shorten_timeout()

    def close(self) -> None:
        """Give the run back."""
        self.lease.release()

    def _earlier_record(self) -> dict[str, Any]:
        """What an earlier command's `run.json` says. It decides nothing of what is done again; a damaged one goes."""
        try:
            record = json.loads(self.store.read_small(RUN_JSON))
            if record.get("format") == FORMAT_VERSION and all(
                isinstance(stage, dict) for stage in record["stages"].values()
            ):
                return dict(record)
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError, LookupError, RecursionError) as error:
            log.warning("%s: cannot be read (%s); it is written anew", self.store.uri_of(RUN_JSON), error)
        return {}


def _as_json(settings: Settings) -> dict[str, Any]:
    """The settings as `run.json` has them: `inf`, which JSON lacks, as a word."""
    return dict(json.loads(settings.model_dump_json()))


def _place(data: str | None) -> str | None:
    """The data's URI, the same from every working folder."""
    if data is None:
        return None
    return data.rstrip("/") if "://" in data else os.path.realpath(os.path.expanduser(data))
