"""What interrupts an epoch: a checkpoint is due, or a node is to be taken away (preempted).

Asked after every step of a training, looked up every few seconds.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from apacs_ray.distributed.ray_internals import draining_nodes
from apacs_ray.errors import ApacsError
from apacs_ray.training.interruption import Interruption

if TYPE_CHECKING:
    import torch

    from apacs_ray.training.ranks import Ranks

ASK_EVERY = 2.0  # s between questions; of 30 s notice that leaves enough
OVERDUE = 300.0  # s after its announced end at which a node is taken to stay


class WorkerInterruptions:
    """What interrupts the workers of Ray Train. All get the same answer.

    Ray's question makes all workers wait for each other, so it is put every few seconds only. After how many steps
    that is, and how long ago the last checkpoint was, workers agree on: their clocks differ.
    """

    def __init__(self, ranks: Ranks, device: torch.device, checkpoint_every: float) -> None:
        self._ranks, self._device, self._checkpoint_every = ranks, device, checkpoint_every
        self._asked = time.monotonic()
        self._steps, self._every = 0, 1
        self._unsaved = 0.0  # s of training since a checkpoint

    def __call__(self) -> Interruption | None:
        """Return what interrupts this epoch now; all workers call this after every step."""
        import ray.train
        import torch

        self._steps += 1
        if self._steps < self._every:
            return None
        now = time.monotonic()
        took = torch.tensor(now - self._asked, dtype=torch.float64, device=self._device)
        seconds = float(self._ranks.all_reduce(took)) / self._ranks.world
        step = seconds / self._steps
        self._asked, self._steps, self._every = now, 0, max(1, min(2 * self._every, int(ASK_EVERY / step)))
        self._unsaved += seconds
        if ray.train.get_preemption_info() is not None:
            return Interruption.LEAVE
        if self._unsaved < self._checkpoint_every:
            return None
        self.kept()
        return Interruption.KEEP

    def kept(self) -> None:
        """Hear that there is a checkpoint of now; all workers call this."""
        self._unsaved = 0.0


class NodeInterruptions:
    """What interrupts a training in a process without Ray Train."""

    def __init__(self, checkpoint_every: float) -> None:
        import ray

        self._node = ray.get_runtime_context().get_node_id()
        self._checkpoint_every = checkpoint_every
        self._asked = self._kept = time.monotonic()
        self._end = 0.0  # unix time; 0: nobody said when

    def __call__(self) -> Interruption | None:
        """Return what interrupts this epoch now, looked up every few seconds."""
        now = time.monotonic()
        if now - self._asked < ASK_EVERY:
            return None
        self._asked = now
        ends = draining_nodes()
        self._end = ends.get(self._node, 0.0)
        if self._node in ends:
            return Interruption.LEAVE
        if now - self._kept < self._checkpoint_every:
            return None
        self.kept()
        return Interruption.KEEP

    def kept(self) -> None:
        """Hear that there is a checkpoint of now."""
        self._kept = time.monotonic()

    def await_end(self) -> None:
        """Wait until the node ends: a process that ended before it would count as a failure of its own.

        Raises:
            ApacsError: The node is still there long after its end.
        """
        time.sleep(max(0.0, self._end - time.time()) + OVERDUE)
        raise ApacsError(f"node {self._node} was to be taken away, but is still there")
