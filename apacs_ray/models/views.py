"""Flips and quarter turns of a picture, over which networks' logits are averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGN = 32  # px: views fit each other only where sides are multiples of the networks' stride
_FLIPS = ((0, False), (2, False), (0, True), (2, True))  # quarter turns, and whether flipped before
_TURNS = ((1, False), (3, False), (1, True), (3, True))


def over_views(
    networks: Callable[[Tensor], Mapping[str, Tensor]],
    images: Tensor,
    views: int,
    plain: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the mean over views of what networks say, each turned back.

    Args:
        networks: Maps pictures (N, C, H, W) to logits (N, 1, H, W) by name.
        images: (N, C, H, W).
        views: 1: the picture as it is; 4: it and its flips; 8: quarter turns of these as well.
        plain: What the networks say of the picture as it is, where that is known.

    Returns:
        Logits (N, 1, H, W) by name.
    """
    if views == 1:
        return dict(networks(images) if plain is None else plain)
    height, width = images.shape[2:]
    padded = F.pad(images, (0, -width % ALIGN, 0, -height % ALIGN))
    sums: dict[str, Tensor] = {}
    chosen = (_FLIPS + _TURNS)[:views]
    if plain is not None and padded.shape == images.shape:
        sums, chosen = dict(plain), chosen[1:]
    for turns, flip in chosen:
        view = torch.rot90(padded.flip(3) if flip else padded, turns, (2, 3))
        for name, output in networks(view.contiguous(memory_format=torch.channels_last)).items():
            back = torch.rot90(output, -turns, (2, 3))
            back = (back.flip(3) if flip else back)[:, :, :height, :width]
            sums[name] = sums[name] + back if name in sums else back
    return {name: total / views for name, total in sums.items()}
