"""The optimizer of a training, and the learning rate of each of its steps."""

from __future__ import annotations

import math

import torch
from torch import nn

from apacs_ray.config.settings import TrainingSettings


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
