"""The mask of a window: what an ensemble says of each pixel, as evaluation judges it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from apacs_ray.data.grid import Box
from apacs_ray.data.images import Mask, Rgb
from apacs_ray.errors import ApacsError, first_line
from apacs_ray.inference.cores import ALIGN
from apacs_ray.inference.objects import STEPS
from apacs_ray.inference.predictor import Predictor
from apacs_ray.models.registry import MEMBERS

SMALLEST = 256  # px, side of what is kept of the smallest window that is tried
TTA_VIEWS = 8


@dataclass(frozen=True)
class Segmented:
    """What became of a window: mask (H, W) bool, the probability of cell, and the members' spread about their mean.

    `probability` and `disagreement` are (H, W) uint16, in 1 / `objects.STEPS`; where one member decides alone, there is
    no disagreement.
    """

    mask: Mask
    probability: npt.NDArray[np.uint16]
    disagreement: npt.NDArray[np.uint16]


class Segmenter:
    """An ensemble, and the rule by which it decides."""

    def __init__(self, predictor: Predictor, use: str, *, threshold: float = 0.5, tta: bool = False) -> None:
        """Decide by `use`: a network's key, `mean` or `majority`; from the probability `threshold` on a px is cell."""
        self._predictor, self._use, self._tta = predictor, use, tta
        self._logit = math.log(threshold / (1 - threshold))
        self._threshold = threshold

    def __call__(self, rgb: Rgb, keep: Box | None = None, halo: int | None = None) -> Segmented:
        """Segment a window; one that does not fit into the GPU's memory in halves, with the same result.

        Args:
            rgb: (H, W, 3) uint8; its corner lies on the lattice of 32 px.
            keep: What is wanted of it, px of the window; None: all.
            halo: px around what is kept that decide on it, a multiple of 32; None: all that there are.

        Returns:
            The mask of what is kept, and what it follows from.

        Raises:
            ApacsError: A logit is no finite number; it would pass for background or cell. Or the GPU's memory is too
                small for any window.
        """
        keep = keep or Box(0, 0, rgb.shape[1], rgb.shape[0])
        try:
            return self._decided(rgb, keep)
        except torch.OutOfMemoryError as error:
            if max(keep.width, keep.height) <= SMALLEST:
                raise ApacsError(
                    f"the GPU's memory is too small for all networks on {rgb.shape[1]} x {rgb.shape[0]} px: set "
                    f"segment.precision bfloat16, or segment.use to one member ({first_line(error)})"
                ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._in_halves(rgb, keep, max(rgb.shape) if halo is None else halo)

    def _in_halves(self, rgb: Rgb, keep: Box, halo: int) -> Segmented:
        """What `__call__` returns, of two windows one after the other."""
        across = keep.width >= keep.height
        begin, length, end = (keep.x, keep.width, rgb.shape[1]) if across else (keep.y, keep.height, rgb.shape[0])
        middle = begin + -(-length // (2 * ALIGN)) * ALIGN
        parts = []
        for first, last in ((begin, middle), (middle, begin + length)):
            low = max((first - halo) // ALIGN * ALIGN, 0)
            high = min(last + halo, end)
            if across:
                window, part = rgb[:, low:high], Box(first - low, keep.y, last - first, keep.height)
            else:
                window, part = rgb[low:high], Box(keep.x, first - low, keep.width, last - first)
            parts.append(self(window, part, halo))
        return Segmented(
            *(
                np.concatenate([getattr(part, name) for part in parts], axis=int(across))
                for name in ("mask", "probability", "disagreement")
            )
        )

    @torch.inference_mode()
    def _decided(self, rgb: Rgb, keep: Box) -> Segmented:
        place = slice(keep.y, keep.y + keep.height), slice(keep.x, keep.x + keep.width)
        logits = {name: output[place] for name, output in self.logits(rgb).items()}
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
        return Segmented(mask.cpu().numpy(), _in_steps(probability), _in_steps(spread))

    def logits(self, rgb: Rgb) -> dict[str, Tensor]:
        """Return logits (H, W) float32 of every network, on the device; with `tta` the mean over eight views."""
        images = self._predictor.to_device([rgb])
        outputs = self._predictor.batch(images, TTA_VIEWS if self._tta else 1)
        return {name: output[0] for name, output in outputs.items()}


def _in_steps(values: Tensor) -> npt.NDArray[np.uint16]:
    """Values of 0..1 in 1 / `objects.STEPS`."""
    steps = (values * STEPS).round().to(torch.int32).to(torch.int16)  # two bytes to copy; the sign is no more
    return steps.cpu().numpy().view(np.uint16)
