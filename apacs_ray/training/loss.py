"""The loss of training: of each tile, over its valid pixels only, which may weigh differently."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from apacs_ray.training.batch import SMOOTH

BOUNDARY = 4  # px on either side of a label's edge to which `boundary_weight` applies


def tile_losses(logits: Tensor, mask: Tensor, weights: Tensor, dice_weight: float) -> Tensor:
    """Return the loss (N,) of each tile: mean binary cross-entropy (the paper's) + dice_weight * (1 - soft Dice).

    Args:
        logits: (N, 1, H, W) float32.
        mask: (N, 1, H, W) float32 in {0, 1}; 1 is cell.
        weights: (N, 1, H, W) float32, from 0, of the pixels in every sum; one with 0 takes no part.
        dice_weight: From 0; with 0 the Dice term is not computed.

    Returns:
        float32 (N,).
    """
    pixels = weights.sum(dim=(1, 2, 3)).clamp(min=1)
    entropy = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    losses = (entropy * weights).sum(dim=(1, 2, 3)) / pixels
    if dice_weight:
        probability = torch.sigmoid(logits) * weights
        overlap = (probability * mask).sum(dim=(1, 2, 3))
        total = (probability + mask * weights).sum(dim=(1, 2, 3))
        losses = losses + dice_weight * (1 - (2 * overlap + SMOOTH) / (total + SMOOTH))
    return losses


def pixel_weights(mask: Tensor, valid: Tensor, ignore_band: int, boundary_weight: float) -> Tensor:
    """Return what each pixel weighs in the loss.

    Args:
        mask: (N, 1, H, W) float32 in {0, 1}; 1 is cell.
        valid: (N, 1, H, W) float32 in {0, 1}; 0 is padding.
        ignore_band: px on either side of a label's edge that weigh nothing: annotators do not agree on them.
        boundary_weight: Added to the 1 of a pixel within `BOUNDARY` px of an edge.

    Returns:
        (N, 1, H, W) float32, from 0; `valid` itself where neither is asked for.
    """
    weights = valid
    if boundary_weight:
        weights = weights + boundary_weight * near_edge(mask, valid, BOUNDARY)
    if ignore_band:
        weights = weights * (1 - near_edge(mask, valid, ignore_band))
    return weights


def near_edge(mask: Tensor, valid: Tensor, distance: int) -> Tensor:
    """Return 1 for valid pixels that have one of the other label within `distance` px (chessboard), else 0.

    Neither the tile's edge nor padding is an edge of a label.

    Args:
        mask: (N, 1, H, W) float32 in {0, 1}.
        valid: Likewise.
        distance: px, from 1.

    Returns:
        (N, 1, H, W) float32 in {0, 1}.
    """
    both = torch.cat([mask * valid, (1 - mask) * valid], dim=1)
    reached = F.max_pool2d(both, 2 * distance + 1, stride=1, padding=distance)
    return reached.prod(dim=1, keepdim=True) * valid
