"""The loss of each tile, over its valid pixels only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMOOTH = 1.0  # px: keeps the Dice term defined on a tile without cells


def tile_losses(logits: Tensor, mask: Tensor, valid: Tensor, dice_weight: float) -> Tensor:
    """Loss (N,) of each tile: mean binary cross-entropy (the paper's loss) + dice_weight * (1 - soft Dice).

    logits, mask, valid: (N, 1, H, W) float32; mask and valid in {0, 1}. A pixel with valid 0 takes no part.
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
