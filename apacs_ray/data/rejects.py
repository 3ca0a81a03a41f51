"""The row that a refused input gets in `rejects/`."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from apacs_ray.errors import BadInput
from apacs_ray.redact import as_text

BAD_NAME = "its path has empty parts, '..' or characters that are no UTF-8; rename it"
STAGE = "ingest"  # the stage that rejects inputs
REJECT_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("slide_id", pa.string()),
        ("x", pa.int64()),
        ("y", pa.int64()),
        ("stage", pa.string()),
        ("code", pa.string()),
        ("reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class Reject:
    """A row of rejects/: one unit with a permanent defect. `code` is a stable word, `reason` a sentence."""

    uri: str
    slide_id: str | None
    x: int | None
    y: int | None
    stage: str
    code: str
    reason: str

    @classmethod
    def of(
        cls,
        defect: BadInput,
        uri: str,
        slide_id: str | None,
        x: int | None = None,
        y: int | None = None,
        *,
        stage: str = STAGE,
    ) -> Reject:
        """Return the row for a defect that a stage met."""
        slide_id = None if slide_id is None else as_text(slide_id)
        return cls(as_text(uri), slide_id, x, y, stage, defect.code, as_text(defect.reason))
