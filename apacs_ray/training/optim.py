"""The optimizer of a training, the learning rate of each of its steps, and the moving average of its weights."""

from __future__ import annotations

import math

import torch
from torch import nn

from apacs_ray.config.training_settings import TrainingSettings


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    """Return the optimizer that `settings` name, at the peak learning rate; Adam and AdamW in their fused form."""
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=rate, weight_decay=decay)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=rate, weight_decay=decay, fused=True)


def learning_rate(settings: TrainingSettings, epoch: int, step: int, steps: int) -> float:
    """Return the learning rate of `step` of the `steps` in `epoch`; all count from 0."""
    return settings.learning_rate * learning_rate_factor(settings, epoch, step, steps)


def learning_rate_factor(settings: TrainingSettings, epoch: int, step: int, steps: int) -> float:
    """Return the share (0..1) of the peak learning rate in a step: linear warm-up, then constant or half a cosine."""
    done = epoch + step / steps
    if done < settings.warmup_epochs:
        return min(1.0, (done + 1 / steps) / settings.warmup_epochs)
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (done - settings.warmup_epochs) / (settings.epochs - settings.warmup_epochs)))


def ema_decay(decay: float, step: int) -> float:
    """Return the decay of the moving average of weights after `step`, from 0: less at first, to leave the start.

    (1 + t) / (10 + t) until that is `decay`, as in TensorFlow's `ExponentialMovingAverage`.
    """
    return min(decay, (1 + step) / (10 + step))


@torch.no_grad()
def average_weights(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Let `average` keep `decay` of its weights, and take the rest from `model`, which is of the same shape."""
    for kept, now in zip(average.parameters(), model.parameters(), strict=True):
        kept.lerp_(now, 1 - decay)
