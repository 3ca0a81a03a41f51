"""What a stage does with rejects: it writes them, and ends when there are more than `data.max_rejects` lets go."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq

from apacs_ray.console import say
from apacs_ray.data.rejects import REJECT_SCHEMA, Reject
from apacs_ray.errors import ApacsError
from apacs_ray.stages.stage import Job
from apacs_ray.storage import Store


def write_rejects(store: Store, path: str, rejects: Sequence[Reject]) -> None:
    """Write the table of rejects, Parquet."""
    table = pa.Table.from_pylist([asdict(reject) for reject in rejects], REJECT_SCHEMA)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    store.write(path, sink.getvalue())


def reject_limit(text: str, listed: int) -> int:
    """Return how many of `listed` units `data.max_rejects` lets go: a count, a share, or the larger of 1 % and 5."""
    if text == "default":
        return max(5, listed // 100)
    if text.endswith("%"):
        return int(listed * float(text[:-1]) / 100)
    return int(text)


def require_within_limit(job: Job, unit: str, rejected: int, listed: int) -> None:
    """Say how many units are rejected.

    Raises:
        ApacsError: They are more than `data.max_rejects` allows.
    """
    text, place = job.settings.data.max_rejects, job.store.uri_of("rejects")
    limit = reject_limit(text, listed)
    if rejected > limit:
        raise ApacsError(
            f"{job.stage}: {rejected} of {listed} {unit} rejected, data.max_rejects ({text}) allows {limit}; "
            f"the reasons are in {place}"
        )
    if rejected:
        say(f"{job.stage}: {rejected} of {listed} {unit} rejected; the reasons are in {place}")
