"""Tells of workers and tasks that wait for resources: which, for how long, for what; Ray waits without a word."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from apacs_ray.console import say
from apacs_ray.distributed.ray_internals import pending_asks
from apacs_ray.distributed.resource_plan import amounts

TOLD_AFTER = 120.0  # s of waiting; then after twice, four times as long
LOOK = 10.0  # s between looks
GONE = 30.0  # s: Ray Train gives its request up every minute, and makes it again
PENDING = ("PENDING", "RESCHEDULING")

Bundles = Sequence[Mapping[str, float]]  # what a worker each asks for, by resource


class Asks(Protocol):
    """What is asked of the cluster, such as a `NetworkPlan`: so many workers at once, with so much each."""

    @property
    def workers(self) -> int:
        """How many, all at once."""

    @property
    def cpus(self) -> float:
        """Of each."""

    @property
    def gpus(self) -> float:
        """Of each."""

    def ask(self) -> str:
        """Return it for a person."""


@dataclass(frozen=True)
class OneAsk:
    """What one task, or one actor of a pool, asks for."""

    cpus: float
    gpus: float = 0.0
    workers: int = field(default=1, init=False)

    def ask(self) -> str:
        """Return it for a person, as in `0.5 GPU + 1 CPU`."""
        return amounts(self.cpus, self.gpus)


@dataclass
class _Wait:
    since: float
    seen: float
    tell_at: float


class Waits:
    """What is said of workers that have no place yet, by what is pending at each look."""

    def __init__(self, asked: Mapping[str, Asks], told_after: float = TOLD_AFTER) -> None:
        self._told_after = told_after
        self._went_on = False
        self._alike: dict[tuple[int, float, float], dict[str, Asks]] = {}  # Ray does not say whose a request is
        for name, plan in asked.items():
            self._alike.setdefault((plan.workers, plan.cpus, plan.gpus), {})[name] = plan
        self._waits: dict[tuple[int, float, float], _Wait] = {}

    def went_on(self) -> None:
        """Forget all waits: something was done meanwhile, so there is no standstill. From any thread."""
        self._went_on = True

    def look(self, pending: Sequence[Bundles], nodes: str, now: float) -> list[str]:
        """Return what is to be said now.

        Args:
            pending: Of each group of workers, and each task and actor, that Ray has found no place for, what it asks
                for.
            nodes: What the cluster has, for people.
            now: Monotonic time, s.

        Returns:
            A line for each kind of workers that has waited long enough since it was told of.
        """
        if self._went_on:
            self._went_on = False
            self._waits.clear()
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


def _is_of(plan: Asks, bundles: Bundles) -> bool:
    """Whether a group asks for the workers of a plan."""
    return len(bundles) == plan.workers and all(
        abs(bundle.get("CPU", 0.0) - plan.cpus) < 1e-3 and abs(bundle.get("GPU", 0.0) - plan.gpus) < 1e-3
        for bundle in bundles
    )


@contextlib.contextmanager
def told_of_waits(
    asked: Mapping[str, Asks], told_after: float = TOLD_AFTER, look: float = LOOK
) -> Iterator[Callable[[], None]]:
    """Say while the block runs which of `asked` wait for resources, and for which.

    Args:
        asked: Workers, by the name that is said.
        told_after: s of waiting before it is told.
        look: s between looks.

    Yields:
        What to call where something was done, which ends a wait: where some of a pool work, the others may wait.
    """
    over, waits = threading.Event(), Waits(asked, told_after)
    thread = threading.Thread(target=_watch, args=(waits, look, over), daemon=True)
    thread.start()  # the main thread stays free for Ctrl-C
    try:
        yield waits.went_on
    finally:
        over.set()


def _watch(waits: Waits, look: float, over: threading.Event) -> None:
    import ray
    from ray.util import placement_group_table

    while not over.wait(look) and ray.is_initialized():
        try:
            groups = placement_group_table().values()
            alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        except (ray.exceptions.RayError, ConnectionError, RuntimeError):
            return  # Ray ends, or its head is gone, which others tell
        pending = [list(group["bundles"].values()) for group in groups if group["state"] in PENDING]
        with contextlib.suppress(ray.exceptions.RayError):  # a head that is slow to say so has time until the next look
            pending += [[ask] for ask in pending_asks()]
        gpus, cpus = (sum(node.get(what, 0.0) for node in alive) for what in ("GPU", "CPU"))
        nodes = f"{len(alive)} node{'s' * (len(alive) != 1)} with {gpus:g} GPU + {cpus:g} CPU"
        for line in waits.look(pending, nodes, time.monotonic()):
            say(line)
