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
        """Raise ApacsError when units were lost or invented."""
        accounted = self.rows_out + sum(self.skipped.values()) + self.rejected
        if accounted != self.rows_in:
            raise ApacsError(
                f"{stage}: {self.rows_in} rows in, but {self.rows_out} out + {sum(self.skipped.values())} skipped + "
                f"{self.rejected} rejected = {accounted}; nothing was committed (a defect: please report it)"
            )


@dataclass(frozen=True)
class Marker:
    """A committed output."""

    stage: str
    fingerprint: str
    lease: str
    started: float
    seconds: float
    counts: Counts
    info: dict[str, Any] = field(default_factory=dict)

    def encode(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def decode(cls, content: bytes) -> Marker:
        tree = json.loads(content)
        return cls(**{**tree, "counts": Counts(**tree["counts"])})
