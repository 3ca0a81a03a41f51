"""Work in a Ray task: on the nodes, with the resources and in a process such as a run would use."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeVar

from apacs_ray.adapters.session import KEEP_MEMORY
from apacs_ray.run import require_source, source_hash

T = TypeVar("T")


def measured(work: Callable[[], T], *, cpus: float, gpus: float) -> tuple[T, float]:
    """What `work()` returns in a process of its own, and the seconds until that process was ready for it."""
    import ray

    expected = source_hash()

    def task() -> tuple[Any, float]:
        import torch  # noqa: F401 - its import is most of what a worker's start takes

        require_source(expected)
        ready = time.time()
        return work(), ready

    started = time.time()
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, runtime_env=KEEP_MEMORY, max_retries=0)(task)
    result, ready = ray.get(remote.remote())
    return result, max(0.0, ready - started)
