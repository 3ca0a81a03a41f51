"""Augmentation of training tiles: a crop, flips and quarter turns on uint8 pixels, and on the device their stain.

Image, heatmaps and mask are transformed together. Tasks that only decode import this, so it does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]
# absorbance of red, green and blue by hematoxylin, eosin and DAB (Ruifrok and Johnston, 2001), each of length 1
DYES = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105), (0.268, 0.570, 0.776))
STRIP = 64  # columns of a picture that are written at a time


@dataclass(frozen=True)
class GeometricTransform:
    """A window of a picture, px, which is then flipped and turned by `quarters` of a turn, counterclockwise."""

    top: int
    left: int
    height: int
    width: int
    flip_rows: bool
    flip_columns: bool
    quarters: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The window as Pillow takes it: left, top, right, bottom."""
        return self.left, self.top, self.left + self.width, self.top + self.height

    def apply(self, picture: Pixels) -> Pixels:
        """Return the window of `picture`, (H, W, C) or (H, W) uint8, flipped and turned."""
        return self.flip_and_turn(picture[self.top : self.top + self.height, self.left : self.left + self.width])

    def flip_and_turn(self, window: Pixels) -> Pixels:
        """Return `window`, (height, width, C) or (height, width) uint8, flipped and turned, in one copy."""
        channels = window[..., None] if window.ndim == 2 else window
        view = np.rot90(channels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1], self.quarters)
        copy = np.empty(view.shape, np.uint8)
        if view.strides[1] == view.shape[2]:  # whole rows at once
            copy[:] = view
        else:  # one by one: faster by channels, and when the rows that are read at a time stay in the cache
            width = STRIP if self.quarters % 2 else view.shape[1]
            for left in range(0, view.shape[1], width):
                for channel in range(view.shape[2]):
                    copy[:, left : left + width, channel] = view[:, left : left + width, channel]
        return copy.reshape(*view.shape[:2], *window.shape[2:])


@dataclass(frozen=True)
class Augmentation:
    """The random geometry of training tiles: a crop of side `crop` px (0: the whole tile), flips and quarter turns.

    Validation tiles stay as they are.
    """

    crop: int
    flips: bool
    turns: bool

    def draw(self, seed: int, size: tuple[int, int]) -> GeometricTransform:
        """Return the transform that `seed` gives a tile of `size` (height, width); one below the crop is kept whole."""
        rng = np.random.default_rng(seed)
        height, width = size
        top = left = 0
        if self.crop:
            top = int(rng.integers(max(height - self.crop, 0) + 1))
            left = int(rng.integers(max(width - self.crop, 0) + 1))
            height, width = min(height, self.crop), min(width, self.crop)
        flip_rows, flip_columns, quarters = rng.integers(2), rng.integers(2), int(rng.integers(4))
        return GeometricTransform(
            top,
            left,
            height,
            width,
            bool(self.flips and flip_rows),
            bool(self.flips and flip_columns),
            quarters if self.turns else 0,
        )


def augment(inputs: Pixels, mask: Pixels, seed: int, augmentation: Augmentation) -> tuple[Pixels, Pixels]:
    """Return inputs (H, W, C) and mask (H, W), uint8, under the same transform, drawn from `seed`."""
    transform = augmentation.draw(seed, (mask.shape[0], mask.shape[1]))
    return transform.apply(inputs), transform.apply(mask)


def jitter_stain(inputs: Tensor, sizes: Sequence[tuple[int, int]], seeds: Sequence[int], strength: float) -> Tensor:
    """Vary each tile's brightness, contrast, saturation (by `strength`) and hue (by a tenth of it), mildly.

    Runs on the training device, after the crop, and leaves heatmaps alone.

    Args:
        inputs: (N, C, H, W) float in 0..1 with RGB in the last three channels.
        sizes: (height, width) of each tile without padding: contrast works on a tile's mean, which must not depend on
            the other tiles of its batch.
        seeds: One for each tile; what it gets is drawn from it.
        strength: 0..1; 0 returns `inputs` as they are.

    Returns:
        A tensor of the same shape and range.
    """
    if not strength:
        return inputs
    from torchvision.transforms.v2 import functional as TF  # a second, which a run without jitter is spared

    def jittered(rgb: Tensor, seed: int) -> Tensor:
        draw = np.random.default_rng([seed, 1]).uniform(-1, 1, 4) * strength
        rgb = TF.adjust_brightness(rgb.contiguous(), 1 + draw[0])
        rgb = TF.adjust_contrast(rgb, 1 + draw[1])
        rgb = TF.adjust_saturation(rgb, 1 + draw[2])
        hued: Tensor = TF.adjust_hue(rgb, draw[3] / 10)
        return hued

    return _with_rgb(inputs, sizes, seeds, jittered)


def vary_dyes(inputs: Tensor, sizes: Sequence[tuple[int, int]], seeds: Sequence[int], strength: float) -> Tensor:
    """Vary how much of each dye a tile has: HED augmentation (Tellez et al., 2018), on absorbance.

    Amounts of three dyes are multiplied by 1 - strength to 1 + strength each, and shifted by a tenth of that, which
    also varies the glass. Runs on the training device, after the crop, and leaves heatmaps alone.

    Args:
        inputs: (N, C, H, W) float in 0..1 with RGB in the last three channels.
        sizes: (height, width) of each tile without padding, which stays as it is.
        seeds: One for each tile; what it gets is drawn from it.
        strength: 0..1; 0 returns `inputs` as they are.

    Returns:
        A tensor of the same shape and range.
    """
    if not strength:
        return inputs
    import torch

    dyes = np.array(DYES)

    def varied(rgb: Tensor, seed: int) -> Tensor:
        draw = np.random.default_rng([seed, 2]).uniform(-1, 1, (2, 3)) * strength
        # absorbance -> dyes, more or less of each, -> absorbance: one matrix and one vector
        change = np.linalg.inv(dyes) @ np.diag(1 + draw[0]) @ dyes
        matrix, shift = (
            torch.tensor(values, dtype=inputs.dtype, device=inputs.device) for values in (change, draw[1] / 10 @ dyes)
        )
        absorbance = -torch.log(rgb.clamp(min=1 / 255))
        changed = torch.einsum("chw,cd->dhw", absorbance, matrix) + shift[:, None, None]
        return torch.exp(-changed).clamp(0, 1)

    return _with_rgb(inputs, sizes, seeds, varied)


def _with_rgb(
    inputs: Tensor, sizes: Sequence[tuple[int, int]], seeds: Sequence[int], change: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """A copy of `inputs` whose RGB, without padding, is what `change` makes of each tile's (3, H, W) and its seed."""
    changed = inputs.clone()
    for tile, (height, width), seed in zip(changed, sizes, seeds, strict=True):
        tile[-3:, :height, :width] = change(tile[-3:, :height, :width], seed)
    return changed
