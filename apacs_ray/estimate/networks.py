"""Seconds a tile that networks take on this machine, from a step or two. No Ray here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from apacs_ray.config.training_settings import TrainingSettings
from apacs_ray.estimate.lines import Seconds
from apacs_ray.evaluation.judged import judged
from apacs_ray.inference.predictor import Predictor
from apacs_ray.models.ensemble import Ensemble
from apacs_ray.models.registry import MEMBERS
from apacs_ray.models.spec import ModelSpec
from apacs_ray.models.weights import build
from apacs_ray.training.augment import Augmentation, augment
from apacs_ray.training.batch import Sample, batches, micro_batch_size
from apacs_ray.training.dataset import decode_pixels, decode_tile_mask, encode_heatmaps
from apacs_ray.training.device import default_device
from apacs_ray.training.optim import make_optimizer
from apacs_ray.training.sampler import SampleRef
from apacs_ray.training.step import train_step

BACKWARD = 2  # times the cost of a forward pass
CPU_BUDGET, GPU_BUDGET = 3e12, 2e14  # FLOPs of a measured step; of larger tiles a part is measured
ASSUMED_GPU = 30e12  # FLOP/s of a GPU that is not there to be measured: what an L4 reaches in bfloat16, about
SMALLEST = 64  # px
REPETITIONS = 3

Size = tuple[int, int]


@dataclass(frozen=True)
class SampleTile:
    """A stored tile, encoded: to decode and to evaluate."""

    image: bytes
    mask: bytes | None

    def pixels(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        """Return RGB (H, W, 3) uint8 and mask (H, W) uint8 in {0, 1}."""
        rgb = decode_pixels(self.image)
        mask = np.zeros(rgb.shape[:2], np.uint8) if self.mask is None else decode_tile_mask(self.mask)
        return rgb, mask


@dataclass(frozen=True)
class Training:
    """A network to be trained: as `settings` say, with `threads` torch threads, by `workers`."""

    spec: ModelSpec
    settings: TrainingSettings
    threads: int
    workers: int


@dataclass(frozen=True)
class Inference:
    """An ensemble to look at tiles: the members of `width`, and fusions by key."""

    fusions: Mapping[str, ModelSpec]
    width: float
    threads: int
    precision: str

    @property
    def members(self) -> list[ModelSpec]:
        """The members, in registry order."""
        return [ModelSpec("member", name, width=self.width) for name in MEMBERS]


@dataclass(frozen=True)
class Times:
    """What networks take on a tile.

    Attributes:
        trainings: `Seconds` of each training.
        members: Seconds through the members, its heatmaps stored.
        everything: Seconds through members and fusions, and the masks counted.
        heatmaps: Bytes of the heatmaps.
    """

    trainings: list[Seconds]
    members: float
    everything: float
    heatmaps: int


def measure(tile: SampleTile, trainings: Sequence[Training], inference: Inference) -> Times:
    """Measure steps on the device of this process."""
    device = default_device()
    load = _seconds_to_load(tile)
    store, size = _storing(tile)
    members, everything = _time_inference(tile, inference, device)
    judge = _seconds_to_judge(tile, inference)
    seconds = [_time_training(tile, training, load, device) for training in trainings]
    return Times(seconds, load + members + store, load + everything + judge, size)


def assume(tile: SampleTile, trainings: Sequence[Training], inference: Inference) -> Times:
    """Return the same for a GPU that is not there: from FLOPs; reading and counting are measured, here."""
    load, judge = _seconds_to_load(tile), _seconds_to_judge(tile, inference)
    whole = tile.pixels()[1].shape
    seconds = []
    for training in trainings:
        forward = flops([training.spec], _cropped(whole, training.settings.crop)) / ASSUMED_GPU
        seconds.append(Seconds((1 + BACKWARD) * forward, flops([training.spec], whole) / ASSUMED_GPU, load))
    members = flops(inference.members, whole) / ASSUMED_GPU
    fusions = flops(list(inference.fusions.values()), whole) / ASSUMED_GPU
    store, size = _storing(tile)
    return Times(seconds, load + members + store, load + members + fusions + judge, size)


def flops(specs: Sequence[ModelSpec], size: Size) -> int:
    """Return the floating-point operations of one forward pass of networks on a tile, without doing it."""
    total = 0
    for spec in specs:
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            build(spec)(torch.empty((1, _channels(spec), *size)))
        total += int(counter.get_total_flops())
    return total


def _channels(spec: ModelSpec) -> int:
    return 3 + (len(spec.members) if spec.kind == "fusion" else 0)


def _cropped(size: Size, crop: int) -> Size:
    return (min(size[0], crop), min(size[1], crop)) if crop else size


def _seconds_to_load(tile: SampleTile) -> float:
    """Decoding and augmentation."""
    return fastest(lambda: augment(*tile.pixels(), 1, Augmentation(0, True, True)))


def _storing(tile: SampleTile) -> tuple[float, int]:
    """Seconds to encode a tile's heatmaps, and their bytes: a blurred gray picture stands for each."""
    gray = Image.fromarray(tile.pixels()[0]).convert("L").filter(ImageFilter.GaussianBlur(4))
    pictures = dict.fromkeys(map(str, MEMBERS), (np.asarray(gray) / 255).astype(np.float32))
    return fastest(lambda: encode_heatmaps(pictures)), len(encode_heatmaps(pictures))


def _seconds_to_judge(tile: SampleTile, inference: Inference) -> float:
    """Counting a tile's pixels and objects for all models."""
    rgb, mask = tile.pixels()
    truth = mask.astype(bool)
    logits = dict.fromkeys((*MEMBERS, *inference.fusions), np.where(truth, 1.0, -1.0).astype(np.float32))
    height, width = truth.shape
    place = {"tile_id": "", "slide_id": "", "x": 0, "y": 0, "width": width, "height": height}
    once = {"once_left": 0, "once_top": 0, "once_right": width, "once_bottom": height}
    return fastest(lambda: judged(rgb, logits, {**place, **once}, truth, border=0, member=MEMBERS[-1]))


def _time_training(tile: SampleTile, training: Training, load: float, device: torch.device) -> Seconds:
    torch.set_num_threads(training.threads)
    spec, settings = training.spec, training.settings
    batch = micro_batch_size(settings, training.workers)
    whole = tile.pixels()[1].shape
    rgb, mask = augment(*tile.pixels(), 1, Augmentation(settings.crop, True, True))
    part = affordable_part([spec], mask.shape, batch * (1 + BACKWARD), device)
    inputs = np.concatenate([np.repeat(rgb[..., :1], _channels(spec) - 3, axis=2), rgb], axis=2)[: part[0], : part[1]]
    refs = [SampleRef(0, "train", 0, row, 1 / batch, row) for row in range(batch)]
    samples = [Sample(ref, "", inputs, mask[: part[0], : part[1]]) for ref in refs]
    torch.manual_seed(0)
    model = build(spec).to(device=device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = make_optimizer(model, settings)

    def step() -> None:
        (whole_step,) = batches(iter(samples), batch)
        output = train_step(model, optimizer, whole_step, settings, device)
        output.losses.cpu()  # waits for the device

    a_tile = fastest(step) / batch
    train = a_tile * flops([spec], mask.shape) / flops([spec], part)
    return Seconds(train, train * flops([spec], whole) / flops([spec], mask.shape) / (1 + BACKWARD), load)


def _time_inference(tile: SampleTile, inference: Inference, device: torch.device) -> tuple[float, float]:
    """Seconds through the members, and through members and fusions."""
    rgb, mask = tile.pixels()
    members, fusions = inference.members, list(inference.fusions.values())
    part = affordable_part([*members, *fusions], mask.shape, 1, device)
    seconds = []
    for heads in ({}, inference.fusions):
        specs = [*members, *heads.values()]
        ensemble = Ensemble(
            {name: build(spec) for name, spec in zip(MEMBERS, members, strict=True)},
            {key: (spec, build(spec)) for key, spec in heads.items()},
        )
        predictor = Predictor(ensemble, threads=inference.threads, precision=inference.precision)
        took = fastest(partial(predictor.logits, rgb[: part[0], : part[1]]))
        seconds.append(took * flops(specs, mask.shape) / flops(specs, part))
    return seconds[0], seconds[1]


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few repetitions: the first allocates, and others use this machine as well."""
    seconds = []
    for _ in range(REPETITIONS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def affordable_part(specs: Sequence[ModelSpec], size: Size, times: int, device: torch.device) -> Size:
    """Return the size (height, width) of the part of a tile that may go through the networks `times` over."""
    budget = GPU_BUDGET if device.type == "cuda" else CPU_BUDGET
    height, width = size
    while min(height, width) > 2 * SMALLEST and times * flops(specs, (height, width)) > budget:
        height, width = height // 2, width // 2
    return height, width
