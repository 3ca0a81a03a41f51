"""A training step of each member: this pipeline's step against a textbook float32 step over the same networks.

Textbook: contiguous layout, float32, plain Adam, one `loss.item()` a step. Ours: `training.step` as a run uses it
(channels_last, bfloat16 autocast where the device computes it fast, fused Adam, freed memory kept), fed from memory;
each in a process of its own. Both pass the same uint8 tiles, dropout and binary cross-entropy. CPU: 512 x 512, batch 2.
GPU: 2000 x 2000 and crops of 1024, by batch size, ten steps a call. The share of the measured bfloat16 peak is the
model FLOPs utilization (MFU). The textbook has PyTorch's defaults: on GPUs its convolutions are TF32.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch.nn.functional as F
from measure import Elsewhere, alternate, forward_flops, matmul_peak, medians, options, require, show
from torch import nn

from apacs_ray.config.training_settings import TrainingSettings
from apacs_ray.distributed.tasks import KEEP_MEMORY
from apacs_ray.models.registry import build_member
from apacs_ray.training.batch import Sample, batches
from apacs_ray.training.device import set_arithmetic
from apacs_ray.training.optim import make_optimizer
from apacs_ray.training.sampler import SampleRef
from apacs_ray.training.speed import compile_trunk
from apacs_ray.training.step import train_step

BACKWARD = 2  # times the cost of a forward pass


def main() -> None:
    """Measure the training step of each network and print the table."""
    parser = options(__doc__, "networks of a quarter of the width, 3 repetitions")
    parser.add_argument("--members", help="networks to measure (default: fcn32,fcn8, on a GPU all three)")
    parser.add_argument("--compile", action="store_true", help="measure run.compile as well")
    parser.add_argument("--profile", action="store_true", help="say which operations a step spends its time in")
    arguments = parser.parse_args()
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    smoke = arguments.smoke
    peak, plain = (matmul_peak(device, dtype, smoke=smoke) for dtype in (torch.bfloat16, torch.float32))
    print(f"matrix products: bfloat16 {peak / 1e12:.3g} TFLOP/s, float32 {plain / 1e12:.3g} TFLOP/s")
    sizes = [(1024, 4), (2000, 1), (2000, 4)] if gpu else [(512, 2)]
    width = 0.25 if arguments.quick else 1.0
    members = arguments.members or ("fcn32,fcn16,fcn8" if gpu else "fcn32,fcn8")
    if smoke:
        sizes, width, members = [(64, 2)], 0.05, "fcn8"
    cases = [Case(name, width, batch, side, device.type) for name in members.split(",") for side, batch in sizes]
    rows = []
    for case in cases:
        try:
            rows.append(_measure(case, peak, arguments))
        except torch.OutOfMemoryError as error:
            rows.append({"network": case.label, "spent_on": {}, "memory": str(error).split(". ")[0]})
        print(rows[-1], flush=True)
    if not gpu:
        print("GPU: not measured (no CUDA device here); the same command measures it where there is one")
    show("training step", rows, arguments.json)


@dataclass(frozen=True)
class Case:
    """A network and a batch that are measured."""

    name: str
    width: float
    batch: int
    side: int
    device: str

    @property
    def label(self) -> str:
        """Its name in the table."""
        return f"{self.name}, {self.batch} x {self.side} px"

    @property
    def steps(self) -> int:
        """How many a call takes: on a GPU several, which its host does not wait for one by one."""
        return 10 if self.device == "cuda" else 1

    def network(self) -> nn.Module:
        """Build the network with the same random weights."""
        torch.manual_seed(0)
        return build_member(self.name, width=self.width)

    def tiles(self) -> list[tuple[Any, Any]]:
        """Make the batch: (side, side, 3) and (side, side) uint8 of each tile."""
        rng = np.random.default_rng(0)
        sides = (self.side, self.side)
        return [
            (rng.integers(0, 256, (*sides, 3), np.uint8), (rng.random(sides) < 0.1).astype(np.uint8))
            for _ in range(self.batch)
        ]


def _measure(case: Case, peak: float, arguments: argparse.Namespace) -> dict[str, Any]:
    ways = {
        "textbook": Elsewhere(partial(Textbook, case), {}),
        "ours": Elsewhere(partial(Ours, case), KEEP_MEMORY["env_vars"]),
    }
    if arguments.compile:
        ways["compiled"] = Elsewhere(partial(Ours, case, compiled=True), KEEP_MEMORY["env_vars"])
    try:
        row = _timed(case, ways, peak, arguments)
    finally:  # also where the memory of one is too small: the next case needs it
        for way in ways.values():
            way.end()
    if arguments.profile or arguments.smoke:
        row["spent_on"] = _profile(Ours(case))
        for operation, share in row["spent_on"].items():
            print(f"{row['network']}: {share:6.1%} {operation}")
    return row


def _timed(case: Case, ways: dict[str, Elsewhere], peak: float, arguments: argparse.Namespace) -> dict[str, Any]:
    for name, way in ways.items():
        loss = way()
        require(isinstance(loss, float) and 0 < loss < 10, f"{case.name}: a loss of {loss} in {name}")
    repetitions = 1 if arguments.smoke else 3 if arguments.quick else 5
    seconds = {name: value / case.steps for name, value in medians(alternate(ways, repetitions)).items()}
    forward = forward_flops(case.network, (case.batch, 3, case.side, case.side))
    speed = (1 + BACKWARD) * forward / seconds["ours"]
    return {
        "network": case.label,
        **{f"{way}_s": value for way, value in seconds.items()},
        "ratio": seconds["textbook"] / seconds["ours"],
        "images_per_s": case.batch / seconds["ours"],
        "TFLOP_per_s": speed / 1e12,
        "share_of_bf16_peak": speed / peak,
        "peak_GiB": ways["ours"].peak_memory() / 2**30,
        "textbook_peak_GiB": ways["textbook"].peak_memory() / 2**30,
    }


class Textbook:
    """One step as a textbook writes it."""

    def __init__(self, case: Case) -> None:
        self._device = torch.device(case.device)
        self._model = case.network().to(self._device).train()
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=1e-4)
        tiles = case.tiles()
        self._inputs = np.stack([image.transpose(2, 0, 1) for image, _ in tiles])
        self._mask = np.stack([mask[None] for _, mask in tiles])
        self._steps = case.steps

    def __call__(self) -> float:
        """Do the steps of a call and return the last one's loss."""
        return [self._step() for _ in range(self._steps)][-1]

    def _step(self) -> float:
        inputs = torch.from_numpy(self._inputs).to(self._device).float() / 255
        mask = torch.from_numpy(self._mask).to(self._device).float()
        loss = F.binary_cross_entropy_with_logits(self._model(inputs), mask)
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        return loss.item()


class Ours:
    """One step as a run takes it."""

    def __init__(self, case: Case, compiled: bool = False) -> None:
        self._settings = TrainingSettings(optimizer="adam", dice_weight=0, jitter=0)
        self._device = torch.device(case.device)
        network = case.network().to(self._device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        if compiled:
            compile_trunk(network)
        self._model = network
        self._optimizer = make_optimizer(self._model, self._settings)
        self._batch, self._steps = case.batch, case.steps
        set_arithmetic(self._settings.precision)
        refs = [SampleRef(0, "train", 0, row, 1 / case.batch, row) for row in range(case.batch)]
        self._samples = [Sample(ref, f"t{ref.row}", *tile) for ref, tile in zip(refs, case.tiles(), strict=True)]

    def __call__(self) -> float:
        """Train the steps of a call and return the last one's loss."""
        for _ in range(self._steps):
            (batch,) = batches(iter(self._samples), self._batch)
            output = train_step(self._model, self._optimizer, batch, self._settings, self._device)
        return float(output.losses.mean())


def _profile(work: Ours) -> dict[str, float]:
    """Return the share of a step's time by operation, the largest eight."""
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as profiler:
        work()
    spent = {
        event.key: event.self_device_time_total if gpu else event.self_cpu_time_total
        for event in profiler.key_averages()
    }
    total = sum(spent.values())
    largest = sorted(spent, key=spent.__getitem__, reverse=True)[:8]
    shares = {name: spent[name] / total for name in largest}
    return shares | {"other operations": 1 - sum(shares.values())}


if __name__ == "__main__":
    main()
