"""Mild stain jitter, on the training device, after the crop; only RGB, never the heatmaps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor


def jitter_stain(inputs: Tensor, sizes: Sequence[tuple[int, int]], seeds: Sequence[int], strength: float) -> Tensor:
    """Vary each tile's brightness, contrast, saturation (by `strength`) and hue (a tenth of it), by its seed.

    inputs (N, C, H, W) float in 0..1 with RGB in the last three channels; returns the same shape and range.
    `sizes` (height, width) leave padding out: contrast works on a tile's mean, which must not depend on the
    other tiles.
    """
    if not strength:
        return inputs
    from torchvision.transforms.v2 import functional as TF  # a second, which a run without jitter is spared

    jittered = inputs.clone()
    for tile, (height, width), seed in zip(jittered, sizes, seeds, strict=True):
        draw = np.random.default_rng([seed, 1]).uniform(-1, 1, 4) * strength
        rgb = tile[-3:, :height, :width].contiguous()
        rgb = TF.adjust_brightness(rgb, 1 + draw[0])
        rgb = TF.adjust_contrast(rgb, 1 + draw[1])
        rgb = TF.adjust_saturation(rgb, 1 + draw[2])
        tile[-3:, :height, :width] = TF.adjust_hue(rgb, draw[3] / 10)
    return jittered
