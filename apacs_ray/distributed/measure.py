"""Work in a Ray task: on the nodes, with the resources and in a process such as a run would use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from apacs_ray.distributed.session import KEEP_MEMORY
from apacs_ray.runs.provenance import require_source, source_hash

T = TypeVar("T")


def measured(work: Callable[[], T], *, cpus: float, gpus: float) -> T:
    """What `work()`, which takes its own time, returns in a process of its own."""
    import ray

    expected = source_hash()

    def task() -> T:
        require_source(expected)
        return work()

    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, runtime_env=KEEP_MEMORY, max_retries=0)(task)
    result: T = ray.get(remote.remote())
    return result
