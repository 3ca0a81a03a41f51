"""Samples and batches: numpy uint8 from decoding to the device. No torch: tasks that only decode import this.

Augmentation moves image, heatmaps and mask together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from apacs_ray.training.sampler import Phase, SampleRef

Pixels = npt.NDArray[np.uint8]
STRIP = 64  # columns of a picture that are written at a time


@dataclass(frozen=True)
class Sample:
    """One tile's turn with its pixels, uint8: inputs (H, W, C), heatmaps then RGB; mask (H, W) in {0, 1}."""

    ref: SampleRef
    tile_id: str
    inputs: Pixels
    mask: Pixels


@dataclass(frozen=True)
class Batch:
    """Tiles that go through the network together, padded right and bottom to the largest.

    inputs (N, C, H, W) uint8, mask and valid (N, 1, H, W) uint8 (valid is 0 on padding), weight (N,) float32;
    `sizes` (height, width) without padding. `ends_step`: the gradients gathered so far make one optimizer
    step.
    """

    epoch: int
    phase: Phase
    step: int
    ends_step: bool
    inputs: Pixels
    mask: Pixels
    valid: Pixels
    weight: npt.NDArray[np.float32]
    sizes: tuple[tuple[int, int], ...]
    seeds: tuple[int, ...]
    tile_ids: tuple[str, ...]


@dataclass(frozen=True)
class Move:
    """What augmentation does to a picture: a window of it, which is then flipped and turned."""

    top: int
    left: int
    height: int
    width: int
    down: bool
    across: bool
    quarters: int

    @classmethod
    def draw(cls, seed: int, size: tuple[int, int], *, crop: int, flips: bool, turns: bool) -> Move:
        """For a tile of `size` (height, width): a window of side `crop` px (0 or a smaller tile: all of it)."""
        rng = np.random.default_rng(seed)
        height, width = size
        top = left = 0
        if crop:
            top = int(rng.integers(max(height - crop, 0) + 1))
            left = int(rng.integers(max(width - crop, 0) + 1))
            height, width = min(height, crop), min(width, crop)
        down, across, quarters = rng.integers(2), rng.integers(2), int(rng.integers(4))
        return cls(top, left, height, width, bool(flips and down), bool(flips and across), quarters if turns else 0)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The window as Pillow takes it: left, top, right, bottom."""
        return self.left, self.top, self.left + self.width, self.top + self.height

    def of(self, picture: Pixels) -> Pixels:
        """The window of (H, W, C) or (H, W), flipped and turned."""
        return self.turned(picture[self.top : self.top + self.height, self.left : self.left + self.width])

    def turned(self, window: Pixels) -> Pixels:
        """The window flipped and turned, in one copy."""
        channels = window[..., None] if window.ndim == 2 else window
        seen = np.rot90(channels[:: -1 if self.down else 1, :: -1 if self.across else 1], self.quarters)
        moved = np.empty(seen.shape, np.uint8)
        if seen.strides[1] == seen.shape[2]:  # whole rows at once
            moved[:] = seen
        else:  # one by one: faster by channels, and when the rows that are read at a time stay in the cache
            width = STRIP if self.quarters % 2 else seen.shape[1]
            for left in range(0, seen.shape[1], width):
                for channel in range(seen.shape[2]):
                    moved[:, left : left + width, channel] = seen[:, left : left + width, channel]
        return moved.reshape(*seen.shape[:2], *window.shape[2:])


def augment(inputs: Pixels, mask: Pixels, seed: int, *, crop: int, flips: bool, turns: bool) -> tuple[Pixels, Pixels]:
    """A random crop of side `crop` px (0 or a smaller tile: all of it), flips and turns, from `seed`."""
    move = Move.draw(seed, (mask.shape[0], mask.shape[1]), crop=crop, flips=flips, turns=turns)
    return move.of(inputs), move.of(mask)


def batches(samples: Iterator[Sample], micro_batch: int) -> Iterator[Batch]:
    """Consecutive samples of one step as batches of at most `micro_batch`; in val, of equal shapes only.

    Training tiles of unequal shapes are padded; validation tiles never are, as padding would reach into the
    logits.
    """
    waiting: list[Sample] = []
    for sample in samples:
        if waiting:
            same_step = _step(sample) == _step(waiting[0])
            same_shape = sample.mask.shape == waiting[0].mask.shape
            training = sample.ref.phase == "train"
            if not same_step or len(waiting) == micro_batch or not (training or same_shape):
                yield _collate(waiting, ends_step=not same_step)
                waiting = []
        waiting.append(sample)
    if waiting:
        yield _collate(waiting, ends_step=True)


def _step(sample: Sample) -> tuple[int, str, int]:
    """Validation has no steps: all of an epoch's tiles may share batches."""
    return sample.ref.epoch, sample.ref.phase, sample.ref.step if sample.ref.phase == "train" else 0


def _collate(samples: Sequence[Sample], *, ends_step: bool) -> Batch:
    first = samples[0]
    sizes = tuple((sample.mask.shape[0], sample.mask.shape[1]) for sample in samples)
    height, width = (max(side) for side in zip(*sizes, strict=True))
    count, channels = len(samples), first.inputs.shape[2]
    inputs = np.zeros((count, channels, height, width), np.uint8)
    mask = np.zeros((count, 1, height, width), np.uint8)
    valid = np.zeros((count, 1, height, width), np.uint8)
    for number, (sample, (rows, columns)) in enumerate(zip(samples, sizes, strict=True)):
        inputs[number, :, :rows, :columns] = sample.inputs.transpose(2, 0, 1)
        mask[number, 0, :rows, :columns] = sample.mask
        valid[number, 0, :rows, :columns] = 1
    return Batch(
        first.ref.epoch,
        first.ref.phase,
        first.ref.step,
        ends_step,
        inputs,
        mask,
        valid,
        np.array([sample.ref.weight for sample in samples], np.float32),
        sizes,
        tuple(sample.ref.seed for sample in samples),
        tuple(sample.tile_id for sample in samples),
    )
