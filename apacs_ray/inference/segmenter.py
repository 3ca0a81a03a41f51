"""The mask of a window: what an ensemble says of each pixel, as evaluation judges it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from apacs_ray.data.images import Mask, Rgb
from apacs_ray.errors import ApacsError
from apacs_ray.inference.cores import ALIGN
from apacs_ray.inference.objects import STEPS
from apacs_ray.inference.predictor import Predictor
from apacs_ray.models.registry import MEMBERS

VIEWS = [(turns, flip) for flip in (False, True) for turns in range(4)]


@dataclass(frozen=True)
class Segmented:
    """What became of a window: mask (H, W) bool, the probability of cell, and the members' spread about their mean.

    `probability` and `disagreement` are (H, W) uint16, in 1 / `objects.STEPS`; where one member decides alone, there is
    no disagreement.
    """

    mask: Mask
    probability: npt.NDArray[np.uint16]
    disagreement: npt.NDArray[np.uint16]

    def crop(self, left: int, top: int, width: int, height: int) -> Segmented:
        """Return a part of it, px of the window."""
        part = slice(top, top + height), slice(left, left + width)
        return Segmented(self.mask[part], self.probability[part], self.disagreement[part])


class Segmenter:
    """An ensemble, and the rule by which it decides."""

    def __init__(self, predictor: Predictor, use: str, *, threshold: float = 0.5, tta: bool = False) -> None:
        """Decide by `use`: a network's key, `mean` or `majority`; from the probability `threshold` on a px is cell."""
        self._predictor, self._use, self._tta = predictor, use, tta
        self._logit = math.log(threshold / (1 - threshold))
        self._threshold = threshold

    @torch.inference_mode()
    def __call__(self, rgb: Rgb) -> Segmented:
        """Segment a window.

        Args:
            rgb: (H, W, 3) uint8.

        Returns:
            Its mask, and what it follows from.

        Raises:
            ApacsError: A logit is no finite number; it would pass for background or cell.
        """
        logits = self.logits(rgb)
        for name, output in logits.items():
            if not bool(torch.isfinite(output).all()):
                raise ApacsError(f"{name}: logits are not finite; its weights are damaged or its training diverged")
        members = torch.stack([torch.sigmoid(logits[name]) for name in MEMBERS if name in logits])
        mean = members.mean(dim=0)
        if self._use == "majority":
            votes = torch.stack([logits[name] >= self._logit for name in MEMBERS]).sum(dim=0)
            mask, probability = votes > len(MEMBERS) / 2, mean
        elif self._use == "mean":
            mask, probability = mean >= self._threshold, mean
        else:
            mask, probability = logits[self._use] >= self._logit, torch.sigmoid(logits[self._use])
        spread = members.std(dim=0, correction=0)
        steps = [(values * STEPS).round().to(torch.int32).cpu().numpy() for values in (probability, spread)]
        return Segmented(mask.cpu().numpy(), steps[0].astype(np.uint16), steps[1].astype(np.uint16))

    def logits(self, rgb: Rgb) -> dict[str, Tensor]:
        """Return logits (H, W) float32 of every network, on the device; with `tta` the mean over eight views."""
        images = self._predictor.to_device(rgb[None])
        if not self._tta:
            return {name: output[0] for name, output in self._predictor.batch(images).items()}
        height, width = rgb.shape[:2]
        # views fit each other only where sides are multiples of the networks' stride
        images = F.pad(images, (0, -width % ALIGN, 0, -height % ALIGN))
        sums: dict[str, Tensor] = {}
        for turns, flip in VIEWS:
            view = torch.rot90(images.flip(3) if flip else images, turns, (2, 3))
            view = view.contiguous(memory_format=torch.channels_last)
            for name, output in self._predictor.batch(view).items():
                back = torch.rot90(output[0], -turns, (0, 1))
                back = back.flip(1) if flip else back
                sums[name] = sums[name] + back if name in sums else back
        return {name: total[:height, :width] / len(VIEWS) for name, total in sums.items()}
