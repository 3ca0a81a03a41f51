"""Samples and batches of training: numpy uint8 from decoding to the device.

Tasks that only decode import this, so it does not import torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from apacs_ray.config.training_settings import TrainingSettings
from apacs_ray.training.augment import Pixels
from apacs_ray.training.sampler import Phase, SampleRef

SMOOTH = 1.0  # px: keeps the Dice term of the loss defined on a tile without cells


@dataclass(frozen=True)
class Sample:
    """One tile of an epoch with its pixels, uint8: inputs (H, W, C), heatmaps then RGB; mask (H, W) in {0, 1}."""

    ref: SampleRef
    tile_id: str
    inputs: Pixels
    mask: Pixels


@dataclass(frozen=True)
class Batch:
    """Tiles that go through the network together, padded right and bottom to the largest.

    inputs (N, H, W, C) uint8, mask (N, 1, H, W) uint8, weight (N,) float32; `sizes` (height, width) without padding,
    which is 0. `ends_step`: the gradients gathered so far make one optimizer step.
    """

    epoch: int
    phase: Phase
    step: int
    ends_step: bool
    inputs: Pixels
    mask: Pixels
    weight: npt.NDArray[np.float32]
    sizes: tuple[tuple[int, int], ...]
    seeds: tuple[int, ...]
    tile_ids: tuple[str, ...]


def micro_batch_size(settings: TrainingSettings, world: int) -> int:
    """Return how many tiles one of `world` workers passes through the network at once."""
    return -(-settings.batch_size // (world * settings.accumulate))


def batches(samples: Iterator[Sample], micro_batch: int) -> Iterator[Batch]:
    """Yield consecutive samples of one step as batches of at most `micro_batch` tiles.

    Training tiles of unequal shapes are padded. Validation tiles never are, as padding would reach into the logits:
    their batches hold tiles of equal shapes only.

    Yields:
        Batches in the order of the samples.
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
    padded = len(set(sizes)) > 1
    fresh = np.zeros if padded else np.empty
    inputs = fresh((count, height, width, channels), np.uint8)
    mask = fresh((count, 1, height, width), np.uint8)
    for number, (sample, (rows, columns)) in enumerate(zip(samples, sizes, strict=True)):
        inputs[number, :rows, :columns] = sample.inputs
        mask[number, 0, :rows, :columns] = sample.mask
    return Batch(
        first.ref.epoch,
        first.ref.phase,
        first.ref.step,
        ends_step,
        inputs,
        mask,
        np.array([sample.ref.weight for sample in samples], np.float32),
        sizes,
        tuple(sample.ref.seed for sample in samples),
        tuple(sample.tile_id for sample in samples),
    )
