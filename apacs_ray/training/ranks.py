"""The DDP workers of a training as one of them sees them: its rank, how many there are, what they tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """One worker among `world`, with the process group of `torch.distributed`; alone, it needs none."""

    rank: int = 0
    world: int = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks, in place, and return it. All ranks must call this."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, value: T) -> list[T]:
        """Return the `value` of every rank, in the order of ranks. All ranks must call this."""
        if self.world == 1:
            return [value]
        values: list[T | None] = [None] * self.world
        dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]
