"""Tells of workers that wait for resources: which, for how long, and for what, while Ray waits without a word."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from apacs_ray.console import say
from apacs_ray.distributed.resource_plan import NetworkPlan

TOLD_AFTER = 120.0  # s of waiting; then after twice, four times as long
LOOK = 10.0  # s between looks
GONE = 30.0  # s: Ray Train gives its request up every minute, and makes it again
PENDING = ("PENDING", "RESCHEDULING")

Bundles = Sequence[Mapping[str, float]]  # what a worker each asks for, by resource


@dataclass
class _Wait:
    since: float
    seen: float
    tell_at: float


class Waits:
    """What is said of workers that have no place yet, by what is pending at each look."""

    def __init__(self, asked: Mapping[str, NetworkPlan], told_after: float = TOLD_AFTER) -> None:
        self._told_after = told_after
        self._alike: dict[tuple[int, float, float], dict[str, NetworkPlan]] = {}  # Ray does not say whose a request is
        for name, plan in asked.items():
            self._alike.setdefault((plan.workers, plan.cpus, plan.gpus), {})[name] = plan
        self._waits: dict[tuple[int, float, float], _Wait] = {}

    def look(self, pending: Sequence[Bundles], nodes: str, now: float) -> list[str]:
        """Return what is to be said now.

        Args:
            pending: Of each group of workers that Ray has found no place for, what they ask for.
            nodes: What the cluster has, for people.
            now: Monotonic time, s.

        Returns:
            A line for each kind of workers that has waited long enough since it was told of.
        """
        lines = []
        for kind, plans in self._alike.items():
            plan, wait = next(iter(plans.values())), self._waits.get(kind)
            count = sum(_is_of(plan, bundles) for bundles in pending)
            if not count:
                if wait is not None and now - wait.seen > GONE:
                    del self._waits[kind]
                continue
            if wait is None:
                wait = self._waits[kind] = _Wait(now, now, now + self._told_after)
            wait.seen = now
            if now >= wait.tell_at:
                waited = now - wait.since
                wait.tell_at = now + waited
                names = (", " if count >= len(plans) else " or ").join(plans)
                lines.append(
                    f"{names}: has waited {waited / 60:.0f} min for {plan.ask()}; the cluster has {nodes} now; Ray "
                    "waits without end for what is missing (Ctrl-C stops it, and the same command goes on)"
                )
        return lines


def _is_of(plan: NetworkPlan, bundles: Bundles) -> bool:
    """Whether a group asks for the workers of a plan."""
    return len(bundles) == plan.workers and all(
        abs(bundle.get("CPU", 0.0) - plan.cpus) < 1e-3 and abs(bundle.get("GPU", 0.0) - plan.gpus) < 1e-3
        for bundle in bundles
    )


@contextlib.contextmanager
def told_of_waits(
    asked: Mapping[str, NetworkPlan], told_after: float = TOLD_AFTER, look: float = LOOK
) -> Iterator[None]:
    """Say while the block runs which of `asked` wait for resources, and for which.

    Args:
        asked: Workers, by the name that is said.
        told_after: s of waiting before it is told.
        look: s between looks.
    """
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(Waits(asked, told_after), look, over), daemon=True)
    thread.start()  # the main thread stays free for Ctrl-C
    try:
        yield
    finally:
        over.set()


def _watch(waits: Waits, look: float, over: threading.Event) -> None:
    import ray
    from ray.util import placement_group_table

    while not over.wait(look) and ray.is_initialized():
        try:
            groups = placement_group_table().values()
            alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        except (ray.exceptions.RaySystemError, ConnectionError, RuntimeError):
            return  # Ray ends, or its head is gone, which others tell
        pending = [list(group["bundles"].values()) for group in groups if group["state"] in PENDING]
        gpus, cpus = (sum(node.get(what, 0.0) for node in alive) for what in ("GPU", "CPU"))
        nodes = f"{len(alive)} node{'s' * (len(alive) != 1)} with {gpus:g} GPU + {cpus:g} CPU"
        for line in waits.look(pending, nodes, time.monotonic()):
            say(line)
