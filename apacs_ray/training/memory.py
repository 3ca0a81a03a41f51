"""The memory that training a network takes on a GPU, and how large a batch may be there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

USABLE = 0.9  # of a GPU's memory: the rest is CUDA's own, and holes
Build = Callable[[], nn.Module]
Shape = tuple[int, int, int, int]
STATE = 16  # bytes a parameter: itself, its gradient, two moments of Adam
AVERAGE = 4  # bytes a parameter: its moving average


def training_memory(build: Build, shape: Shape, *, half: bool, averaged: bool = False) -> int:
    """Count what a training step holds at a time, without computing it.

    Args:
        build: Makes the network.
        shape: (N, C, H, W) of the batch.
        half: In bfloat16 autocast.
        averaged: With moving averages of the weights.

    Returns:
        Bytes: weights, gradients, the optimizer's moments and averages, what the forward pass keeps for the backward
        pass, and the gradients of its largest part.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with FakeTensorMode():
        network = build().train()
        parameters = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
        inputs = torch.empty(shape)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=half),
        ):
            network(inputs)
        sizes = [tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in parameters]
        weights = sum(parameter.numel() for parameter in network.parameters())
    return _state(averaged) * weights + sum(sizes) + 2 * max(sizes, default=0)


def step_memory(builds: Sequence[Build], shape: Shape, *, half: bool, averaged: bool = False) -> int:
    """Count what the largest step holds, in bytes, of networks that lie on a GPU together and are stepped in turn."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        states = [_state(averaged) * sum(weight.numel() for weight in build().parameters()) for build in builds]
    steps = [training_memory(build, shape, half=half, averaged=averaged) for build in builds]
    return max(sum(states) - own + step for own, step in zip(states, steps, strict=True))


def _state(averaged: bool) -> int:
    return STATE + AVERAGE * averaged


def fitting_batch(builds: Sequence[Build], shape: Shape, *, half: bool, memory: float, averaged: bool = False) -> int:
    """Return how many tiles of a batch of `shape` may pass networks at once on a GPU with `memory` bytes: halves.

    At least 1, whether that fits or not: what is too large says so itself.
    """
    batch = shape[0]
    while batch > 1 and step_memory(builds, (batch, *shape[1:]), half=half, averaged=averaged) > USABLE * memory:
        batch = -(-batch // 2)
    return batch


def input_side(crop: int, largest: int) -> int:
    """Return the side, in px, of a square as large as the largest input of training.

    Args:
        crop: Side that tiles are cut to; 0: none.
        largest: px of the largest tile.
    """
    return math.isqrt(min(crop * crop or largest, largest) - 1) + 1
