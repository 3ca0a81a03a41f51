"""The loss of training: of each tile, over its valid pixels only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apacs_ray.training.batch import SMOOTH


def tile_losses(logits: Tensor, mask: Tensor, valid: Tensor, dice_weight: float) -> Tensor:
    """Return the loss (N,) of each tile: mean binary cross-entropy (the paper's) + dice_weight * (1 - soft Dice).

    Args:
        logits: (N, 1, H, W) float32.
        mask: (N, 1, H, W) float32 in {0, 1}; 1 is cell.
        valid: (N, 1, H, W) float32 in {0, 1}; a pixel with 0 takes no part.
        dice_weight: From 0; with 0 the Dice term is not computed.

    Returns:
        float32 (N,).
    """
    pixels = valid.sum(dim=(1, 2, 3)).clamp(min=1)
    entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    losses = (entropy * valid).sum(dim=(1, 2, 3)) / pixels
    if dice_weight:
        probability = torch.sigmoid(logits) * valid
        overlap = (probability * mask).sum(dim=(1, 2, 3))
        total = (probability + mask * valid).sum(dim=(1, 2, 3))
        losses = losses + dice_weight * (1 - (2 * overlap + SMOOTH) / (total + SMOOTH))
    return losses
