"""Commit markers: the one small object, written last, by which a stage's output counts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from apacs_ray.errors import ApacsError

MARKER = "_committed.json"


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
    """

    stage: str
    fingerprint: str
    lease: str
    started: float
    seconds: float
    counts: Counts
    result: dict[str, Any] = field(default_factory=dict)

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
        except (TypeError, LookupError, RecursionError) as error:
            raise ValueError(f"no marker of this version ({error})") from error
