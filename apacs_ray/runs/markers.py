"""Commit markers: the one small object, written last, by which a stage's output counts."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from typing import Any

from apacs_ray.errors import ApacsError
from apacs_ray.storage import Store

MARKER = "_committed.json"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counts:
    """What became of a stage's units. Rows in = rows out + skips + rejects, always."""

    rows_in: int
    rows_out: int
    skipped: dict[str, int] = field(default_factory=dict)
    rejected: int = 0

    def reconcile(self, stage: str) -> None:
        """Check that no unit was lost or invented.

        Raises:
            ApacsError: naming `stage` and the counts, when they do not add up.
        """
        accounted = self.rows_out + sum(self.skipped.values()) + self.rejected
        if accounted != self.rows_in:
            raise ApacsError(
                f"{stage}: {self.rows_in} rows in, but {self.rows_out} out + {sum(self.skipped.values())} skipped + "
                f"{self.rejected} rejected = {accounted}; nothing was committed (a defect: please report it)"
            )


@dataclass(frozen=True)
class Marker:
    """A committed output.

    Attributes:
        stage: Name of the stage.
        fingerprint: Of everything that the output depends on.
        lease: Owner of the lease under which it was committed.
        started: Unix time at which the work began.
        seconds: How long it took.
        counts: What became of the units.
        result: The stage's result as JSON: what later stages and readers may know of it.
        inputs: Fingerprints of the stages that it started from, by their folders.
        script: The script in `pipelines/` that does the stage.
    """

    stage: str
    fingerprint: str
    lease: str
    started: float
    seconds: float
    counts: Counts
    result: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    script: str = ""

    def encode(self) -> bytes:
        """Return the marker as JSON."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False).encode()

    @classmethod
    def decode(cls, content: bytes) -> Marker:
        """Read a marker.

        Returns:
            The marker that `encode` gave.

        Raises:
            ValueError: for what is no marker of this version: cut, empty, or of another format.
        """
        try:
            tree = json.loads(content)
            return cls(**{**tree, "counts": Counts(**tree["counts"])})
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise ValueError(f"no marker of this version ({error})") from error


def read_marker(store: Store, folder: str) -> Marker | None:
    """Return the marker in `folder` of a run, whatever its fingerprint; None without one that can be read."""
    path = f"{folder}/{MARKER}"
    try:
        return Marker.decode(store.read(path))
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s: %s; the stage is done again", store.uri_of(path), error)
        return None


def require_current(store: Store, folder: str) -> Marker:
    """Check that the output in a folder of a run, and all that it started from, are of one piece.

    Returns:
        The folder's marker.

    Raises:
        ApacsError: when nothing is committed there, or what it started from was done anew since.
    """
    marker = read_marker(store, folder)
    if marker is None:
        raise ApacsError(f"{store.uri}: no finished run: nothing is committed in {folder}/")
    for before, fingerprint in marker.inputs.items():
        now = require_current(store, before)
        if now.fingerprint != fingerprint:
            raise ApacsError(
                f"{store.uri}: {marker.stage} is outdated, as {now.stage} was done anew; run python "
                f"pipelines/{marker.script} with the options of the run"
            )
    return marker
