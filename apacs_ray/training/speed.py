"""What makes steps of one size faster on GPUs: cuDNN's search for algorithms, and `torch.compile` of the trunk.

Both cost seconds for each size of a batch. So they serve the size that nearly all steps have, of whole crops; batches
of edge tiles, the last ones of an epoch and validation do without. Neither changes the names of the weights.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from apacs_ray.config.training_settings import TrainingSettings
from apacs_ray.errors import ApacsError
from apacs_ray.training.batch import Batch

# Passes of a network from which on the search pays. On an H100 it took 10 to 15 s: the time of some 310 steps of FCN-8,
# which gained 3 %, and of 1400 of FCN-32, which gained a fifth. So 10 500 and 7 000 steps earn it back; a slower GPU
# searches and computes slower alike. Twice that, as training may end early.
SEARCH_PAYS = 20_000


@dataclass(frozen=True)
class Speed:
    """How batches of the usual size are computed.

    Attributes:
        shape: (N, H, W) of a usual batch.
        search: cuDNN tries its algorithms on it and takes the fastest.
        compiled: The trunk of the network is compiled for it.
    """

    shape: tuple[int, int, int] = (0, 0, 0)
    search: bool = False
    compiled: bool = False

    @contextlib.contextmanager
    def for_batch(self, batch: Batch) -> Iterator[None]:
        """Let a usual training batch be computed faster while the block runs, and any other as ever."""
        usual = batch.phase == "train" and batch.inputs.shape[:3] == self.shape
        with contextlib.ExitStack() as stack:
            if self.search and usual:
                torch.backends.cudnn.benchmark = True
                stack.callback(setattr, torch.backends.cudnn, "benchmark", False)
            if self.compiled and not usual:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield


PLAIN = Speed()


def plan_speed(
    settings: TrainingSettings,
    device: torch.device,
    *,
    largest: int,
    tiles: int,
    batch: int,
    micro_batch: int,
    deterministic: bool,
    compiled: bool,
) -> Speed:
    """Return what pays for a training: nothing but on CUDA, with crops of one size, where bits may differ.

    Args:
        settings: Of the network.
        device: Where it trains.
        largest: px of the largest tile.
        tiles: Of the training part.
        batch: Tiles of a step that this rank gets.
        micro_batch: Those of them that pass the network at once.
        deterministic: The same bits are asked for each time; the search, and what a compiler tries, may vary.
        compiled: The trunk is asked to be compiled.
    """
    crop = settings.crop
    if device.type != "cuda" or deterministic or not crop or crop * crop > largest:
        return PLAIN
    passes = settings.epochs * math.ceil(tiles / settings.batch_size) * (batch // micro_batch)
    return Speed((micro_batch, crop, crop), passes >= SEARCH_PAYS, compiled)


def compile_trunk(network: nn.Module) -> None:
    """Let a network's trunk be compiled when it first sees a batch. Dropout draws as without.

    Raises:
        ApacsError: There is nothing to compile with.
    """
    compiler = os.environ.get("CC") or "gcc"
    if importlib.util.find_spec("triton") is None or shutil.which(compiler) is None:
        raise ApacsError(
            f"run.compile: a worker has no Triton or no C compiler ({compiler}); install both on every GPU node, or "
            "leave it out"
        )
    trunk = network.get_submodule("trunk")
    trunk.compile(dynamic=False, options={"fallback_random": True})
