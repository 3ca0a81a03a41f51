"""A training step: from a batch to a loss, from the loss to gradients, and from gradients to new weights.

Plain functions, which the epoch loop, `--estimate` and the benchmarks call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from apacs_ray.config.training_settings import MembersSettings, TrainingSettings
from apacs_ray.training.augment import jitter_stain, vary_dyes
from apacs_ray.training.batch import Batch
from apacs_ray.training.device import uses_bfloat16
from apacs_ray.training.loss import pixel_weights, tile_losses


@dataclass(frozen=True)
class StepOutput:
    """A batch after its forward pass, on the device, float32.

    losses (N,), one a tile; logits, mask and valid (N, 1, H, W), mask and valid in {0, 1}.
    """

    losses: Tensor
    logits: Tensor
    mask: Tensor
    valid: Tensor


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, settings: TrainingSettings, device: torch.device
) -> StepOutput:
    """Learn from one batch that is a whole step: gradients, and the optimizer's update at its present rate."""
    output = backward(model, batch, settings, device)
    update(optimizer)
    return output


def forward(model: nn.Module, batch: Batch, settings: TrainingSettings, device: torch.device) -> StepOutput:
    """Return what the model says of a batch. uint8 travels to the device, and is normalized to 0..1 there.

    Args:
        model: Maps (N, C, H, W) float in 0..1 to logits (N, 1, H, W).
        batch: In the training part its RGB is varied, and its pixels weigh as settings say.
        settings: Precision, stain augmentation, and the weights of the loss; of members deep supervision, too.
        device: Where the model is.

    Returns:
        Losses and logits, with their graph where gradients are recorded.
    """
    inputs = _to_device(batch.inputs, device).permute(0, 3, 1, 2).float() / 255  # channels last, as pictures are stored
    training = batch.phase == "train"
    if training:
        inputs = vary_dyes(inputs, batch.sizes, batch.seeds, settings.stain)
        inputs = jitter_stain(inputs, batch.sizes, batch.seeds, settings.jitter)
    deep = settings.deep_supervision if training and isinstance(settings, MembersSettings) else 0.0
    with torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(settings.precision, device)):
        stages: Tensor = model(inputs, stages=True) if deep else model(inputs)
    logits = stages[:, -1:].float()
    mask = _to_device(batch.mask, device).float()
    valid = valid_pixels(batch.sizes, mask)
    weights = pixel_weights(mask, valid, settings.ignore_band, settings.boundary_weight) if training else valid
    losses = tile_losses(logits, mask, weights, settings.dice_weight)
    for stage in range(stages.shape[1] - 1):
        losses = losses + deep * tile_losses(stages[:, stage : stage + 1].float(), mask, weights, settings.dice_weight)
    return StepOutput(losses, logits, mask, valid)


def valid_pixels(sizes: Sequence[tuple[int, int]], mask: Tensor) -> Tensor:
    """Return 1 where a batch has pixels, 0 where it is padded.

    Args:
        sizes: (height, width) of each tile.
        mask: (N, 1, H, W), float32.

    Returns:
        Alike.
    """
    valid = torch.ones_like(mask)
    for tile, (height, width) in zip(valid, sizes, strict=True):
        tile[:, height:] = 0
        tile[:, :, width:] = 0
    return valid


def backward(model: nn.Module, batch: Batch, settings: TrainingSettings, device: torch.device) -> StepOutput:
    """Add a batch's gradients to those of the model; the output is detached from the graph.

    The loss is the weighted sum over tiles. Under DDP gradients travel once a step, with its last micro batch; the
    forward pass of that arms it.

    Returns:
        Losses and logits, without their graph.
    """
    weight = _to_device(batch.weight, device)
    waits = isinstance(model, nn.parallel.DistributedDataParallel) and not batch.ends_step
    with model.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
        output = forward(model, batch, settings, device)
        torch.autograd.backward((output.losses * weight).sum())
    return StepOutput(output.losses.detach(), output.logits.detach(), output.mask, output.valid)


def update(optimizer: torch.optim.Optimizer, learning_rate: float | None = None) -> None:
    """Change the weights by the gradients gathered so far, at `learning_rate` where it is given; then drop these."""
    if learning_rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _to_device(array: npt.NDArray[np.uint8] | npt.NDArray[np.float32], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor
