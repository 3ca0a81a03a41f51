"""Whether a node is to be taken away (preempted), asked after every step of a training, looked up every few seconds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from apacs_ray.distributed.ray_internals import draining_nodes
from apacs_ray.errors import ApacsError

if TYPE_CHECKING:
    import torch

    from apacs_ray.training.ranks import Ranks

ASK_EVERY = 2.0  # s between questions; of 30 s notice that leaves enough
OVERDUE = 300.0  # s after its announced end at which a node is taken to stay


class WorkerPreemption:
    """For workers of Ray Train: whether a node of their run is to be taken away. All get the same answer.

    Ray's question makes all workers wait for each other, so it is put every few seconds only. After how many steps
    that is, workers agree on: their clocks differ.
    """

    def __init__(self, ranks: Ranks, device: torch.device) -> None:
        self._ranks, self._device = ranks, device
        self._asked = time.monotonic()
        self._steps, self._every = 0, 1

    def __call__(self) -> bool:
        """Return whether a node is to be taken away; all workers call this after every step."""
        import ray.train
        import torch

        self._steps += 1
        if self._steps < self._every:
            return False
        now = time.monotonic()
        took = torch.tensor((now - self._asked) / self._steps, dtype=torch.float64, device=self._device)
        step = float(self._ranks.all_reduce(took)) / self._ranks.world
        self._asked, self._steps, self._every = now, 0, max(1, min(2 * self._every, int(ASK_EVERY / step)))
        return ray.train.get_preemption_info() is not None


class NodePreemption:
    """For a process without Ray Train: whether its node is to be taken away."""

    def __init__(self) -> None:
        import ray

        self._node = ray.get_runtime_context().get_node_id()
        self._asked = time.monotonic()
        self._end = 0.0  # unix time; 0: nobody said when

    def __call__(self) -> bool:
        """Return whether the node is to be taken away, looked up every few seconds."""
        if time.monotonic() - self._asked < ASK_EVERY:
            return False
        self._asked = time.monotonic()
        ends = draining_nodes()
        self._end = ends.get(self._node, 0.0)
        return self._node in ends

    def await_end(self) -> None:
        """Wait until the node ends: a process that ended before it would count as a failure of its own.

        Raises:
            ApacsError: The node is still there long after its end.
        """
        time.sleep(max(0.0, self._end - time.time()) + OVERDUE)
        raise ApacsError(f"node {self._node} was to be taken away, but is still there")
