"""Checks of data and output wherever they are, with the buckets that were asked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field

from botocore.exceptions import BotoCoreError

from apacs_ray.doctor import folders, objects
from apacs_ray.doctor.answers import explain_setup
from apacs_ray.doctor.finding import Finding
from apacs_ray.errors import ApacsError
from apacs_ray.redact import uri_defect
from apacs_ray.runs.lease import BEAT_TIMEOUT, holder_of
from apacs_ray.storage import LocalStore, S3Store, open_store


@dataclass
class Stores:
    """The buckets that were asked, with their clocks and the secrets that must not be printed."""

    buckets: list[objects.Bucket] = field(default_factory=list)

    def check_data(self, name: str, uri: str | None) -> Iterable[Finding]:
        """Check that the data at `uri` can be listed and read."""
        if uri is None:
            return [Finding(name, "ok", "none given: synthetic smears")] if name == "data" else []
        store = self._open(name, uri)
        if isinstance(store, LocalStore):
            return folders.check_data(store, name)
        return [store] if isinstance(store, Finding) else objects.check_data(store)

    def check_output(self, name: str, uri: str) -> Iterable[Finding]:
        """Check that a run could write at `uri`."""
        store = self._open(name, uri)
        if isinstance(store, LocalStore):
            return folders.check_output(store, name)
        return [store] if isinstance(store, Finding) else objects.check_output(store)

    def check_lock(self, uri: str) -> Iterable[Finding]:
        """Check that no other run holds the output. Trouble with the store is for `check_output` to tell."""
        with contextlib.suppress(ApacsError, OSError):
            held = holder_of(open_store(uri).with_timeout(BEAT_TIMEOUT))
            if held is None or held.is_dead_here():
                return [Finding("lock", "ok", "no other run holds the output")]
            if held.beats():
                advice = "wait until it ends, or choose another --output"
                return [Finding("lock", "failed", f"{uri}: held by {held.describe()}", advice)]
            advice = "a run looks first whether that one lives; if not, set the clocks: timedatectl set-ntp true"
            message = f"{uri}: held by {held.describe()}, last heartbeat {held.when()}"
            return [Finding("lock", "warning", message, advice)]
        return []

    def check_clock(self) -> Iterable[Finding]:
        """Compare this machine's clock with those of the buckets."""
        return objects.check_clock(self.buckets)

    def secrets(self) -> set[str]:
        """Return the keys and tokens that open the buckets."""
        keys = [(bucket.store.access.secret_key, bucket.store.access.session_token) for bucket in self.buckets]
        return {key for pair in keys for key in pair if key}

    def _open(self, name: str, uri: str) -> LocalStore | objects.Bucket | Finding:
        if (defect := uri_defect(uri)) is not None:
            return Finding(name, "failed", *defect.split("; ", 1))
        try:
            store = open_store(uri)
            if isinstance(store, S3Store):
                self.buckets.append(objects.Bucket(store, name))
                return self.buckets[-1]
        except (BotoCoreError, ApacsError) as error:
            return explain_setup(name, error)
        assert isinstance(store, LocalStore)
        return store
