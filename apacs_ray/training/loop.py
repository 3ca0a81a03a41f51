"""From batches to a trained network: step, epoch, validation, early stopping. No Ray, no data formats."""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from apacs_ray.errors import ApacsError, TrainingError
from apacs_ray.training.batch import Batch, Sample, batches
from apacs_ray.training.config import TrainConfig
from apacs_ray.training.history import EpochPart, EpochRecord, score
from apacs_ray.training.jitter import jitter_stain
from apacs_ray.training.loss import tile_losses
from apacs_ray.training.state import TrainState, bare_model, load_state

AllReduce = Callable[[Tensor], Tensor]
NAMES = 512  # bytes in which a rank tells the others its tiles with a loss that is not finite


def train_epochs(
    trainers: Sequence[Trainer],
    samples: Iterator[Sample],
    steps: int,
    on_epoch: Callable[[Trainer, EpochRecord], None],
    leave: Callable[[], bool] = lambda: False,
    tiles: tuple[int, int] | None = None,
) -> Sequence[Trainer]:
    """Train networks on one stream of `samples`, each batch made once and given to all, until all are finished.

    The stream begins at the `earliest_place` and has `steps` an epoch; a network that is ahead
    (training was killed between two checkpoints) waits. All must have the same batch settings. Raises ApacsError when
    a loss is not finite, naming the tiles, when the stream lacks steps, or when not all of the training and validation
    `tiles` came, each once, to the ranks together; `on_epoch` does not see such an epoch.

    `leave` is asked after every step: when it says so, training ends there, and the networks that are returned are in
    the middle of an epoch, which their `state` holds.
    """
    (micro_batch,) = {trainer.config.micro_batch(trainer.world) for trainer in trainers}
    stream = batches(samples, micro_batch)
    batch = next(stream, None)
    while active := [trainer for trainer in trainers if not trainer.finished()]:
        epoch, first = earliest_place(active)
        taken = first
        taking = [trainer for trainer in active if trainer.next_epoch == epoch]
        for trainer in taking:
            trainer.begin_epoch()
        while batch is not None and batch.epoch == epoch:
            for trainer in taking:
                trainer.take(batch, steps)
            stepped = batch.phase == "train" and batch.ends_step
            taken += stepped and batch.step >= first
            if stepped and leave():
                for trainer in taking:
                    trainer.leave_epoch()
                return taking
            batch = next(stream, None)
        if taken != steps:
            raise ApacsError(f"epoch {epoch}: {taken} of {steps} steps arrived: training data was lost on its way")
        for trainer in taking:
            on_epoch(trainer, trainer.end_epoch(tiles))
    return []


def earliest_place(trainers: Sequence[Trainer]) -> tuple[int, int]:
    """Epoch and step with which the stream for `trainers` begins; behind the last epoch when all are finished."""
    places = [trainer.place for trainer in trainers if not trainer.finished()]
    return min(places, default=(max(trainer.config.epochs for trainer in trainers), 0))


class Trainer:
    """One network in training on one device. Under DDP `model` is wrapped, and `all_reduce` sums over ranks.

    A bare model is moved to `device` and to channels_last. A wrapped one must already be there: DDP lays out
    its gradient buckets when it wraps, and a layout changed afterwards gives wrong gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        *,
        device: torch.device,
        rank: int = 0,
        world: int = 1,
        all_reduce: AllReduce = lambda tensor: tensor,
    ) -> None:
        wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
        self.model = model if wrapped else model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.config = config
        self.device = device
        self.rank = rank
        self.world = world
        self.optimizer = make_optimizer(self.model, config)
        self.history: tuple[EpochRecord, ...] = ()
        self._part: EpochPart | None = None  # of the epoch in progress, from a checkpoint or for one
        self._all_reduce = all_reduce
        self._autocast = resolve_precision(config.precision, device)

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint. Raises ApacsError when it is damaged."""
        state = load_state(folder, self.model, self.optimizer)
        self.history, self._part = state.history, state.part

    @property
    def next_epoch(self) -> int:
        """The first epoch that is not done."""
        return self.history[-1].epoch + 1 if self.history else 0

    @property
    def place(self) -> tuple[int, int]:
        """The epoch and step with which training goes on."""
        return self.next_epoch, self._part.steps if self._part else 0

    def finished(self) -> bool:
        """Whether the last epoch is done, or `patience` epochs passed without a better validation Dice."""
        if self.next_epoch >= self.config.epochs:
            return True
        return bool(self.config.patience) and epochs_since_best(self.history) >= self.config.patience

    def run(
        self,
        samples: Iterator[Sample],
        steps: int,
        on_epoch: Callable[[EpochRecord, TrainState], None],
        tiles: tuple[int, int] | None = None,
    ) -> tuple[EpochRecord, ...]:
        """Train this network alone; see `train_epochs`. Returns the history."""
        train_epochs([self], samples, steps, lambda trainer, record: on_epoch(record, trainer.state()), tiles=tiles)
        return self.history

    def state(self) -> TrainState:
        """What a checkpoint holds."""
        return TrainState(self.model, self.optimizer, self.history, self._part)

    def begin_epoch(self) -> None:
        """Make ready for the batches of `next_epoch`."""
        part, self._part = self._part, None
        self._started = time.monotonic() - (part.seconds if part else 0.0)
        self._steps = part.steps if part else 0
        self._train, self._val = _Tally(self.device), _Tally(self.device)
        if part and self.rank == 0:  # they are the sums of all ranks
            self._train.go_on(part.sums)
        self.model.train()

    def take(self, batch: Batch, steps: int) -> None:
        """Learn from a training batch (of an epoch of `steps`), or judge a validation batch.

        Steps that were done before the epoch was left are passed over.
        """
        if batch.phase == "val":
            self._validate_batch(batch, self._val)
        elif batch.step >= self._steps:
            self._train_batch(batch, self._train, steps)
            self._steps += batch.ends_step

    def leave_epoch(self) -> None:
        """Leave the epoch between two steps; `state` then holds it. Raises ApacsError as `end_epoch` does."""
        self._require_finite(self.next_epoch, "train", self._train)
        seconds = round(time.monotonic() - self._started, 3)
        self._part = EpochPart(self.next_epoch, self._steps, self._train.sums(self._all_reduce), seconds)

    def end_epoch(self, tiles: tuple[int, int] | None = None) -> EpochRecord:
        """Close the epoch; its record joins the history.

        Raises TrainingError naming tiles whose loss is not finite, or when training and validation `tiles` are others.
        """
        epoch = self.next_epoch
        self._require_finite(epoch, "train", self._train)
        self._require_finite(epoch, "val", self._val)  # also meets weights that the epoch's last step broke
        train_loss, train_dice, trained = self._train.result(self._all_reduce)
        val_loss, val_dice, judged = self._val.result(self._all_reduce)
        if tiles is not None and (trained, judged) != tiles:
            raise TrainingError(
                f"epoch {epoch}: {trained} training and {judged} validation tiles came, not {tiles[0]} and {tiles[1]} "
                "(a defect: please report it)"
            )
        rate = float(self.optimizer.param_groups[0]["lr"])
        seconds = round(time.monotonic() - self._started, 3)
        record = EpochRecord(epoch, train_loss, train_dice, val_loss, val_dice, rate, seconds)
        self.history = (*self.history, record)
        return record

    def _forward(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, mask and valid, float32, on the device; uint8 travels there and is normalized there."""
        inputs = self._to_device(batch.inputs).to(memory_format=torch.channels_last).float() / 255
        if batch.phase == "train":
            inputs = jitter_stain(inputs, batch.sizes, batch.seeds, self.config.jitter)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
            logits = model(inputs)
        return logits.float(), self._to_device(batch.mask).float(), self._to_device(batch.valid).float()

    def _to_device(self, array: npt.NDArray[np.uint8] | npt.NDArray[np.float32]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def _train_batch(self, batch: Batch, tally: _Tally, steps: int) -> None:
        torch.manual_seed(_dropout_seed(self.config.seed, batch, self.rank))
        weight = self._to_device(batch.weight)
        with self._synced_at(batch.ends_step):
            logits, mask, valid = self._forward(self.model, batch)
            losses = tile_losses(logits, mask, valid, self.config.dice_weight)
            torch.autograd.backward((losses * weight).sum())
        tally.add(batch, losses.detach(), (weight > 0).float(), logits.detach(), mask, valid)
        if batch.ends_step:
            rate = self.config.learning_rate * rate_factor(self.config, batch.epoch, batch.step, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def _synced_at(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Under DDP gradients travel once a step, with its last micro batch; its forward pass arms that."""
        if not last and isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.no_sync()
        return contextlib.nullcontext()

    @torch.no_grad()
    def _validate_batch(self, batch: Batch, tally: _Tally) -> None:
        self.model.eval()
        # without DDP's wrapper: ranks hold different numbers of tiles, so none may wait for another here
        logits, mask, valid = self._forward(bare_model(self.model), batch)
        losses = tile_losses(logits, mask, valid, self.config.dice_weight)
        tally.add(batch, losses, torch.ones_like(losses), logits, mask, valid)

    def _require_finite(self, epoch: int, phase: str, tally: _Tally) -> None:
        """Raise the same ApacsError on every rank when any rank met a loss that is not finite."""
        told = torch.zeros(self.world, NAMES, dtype=torch.int64, device=self.device)
        if (bad := tally.first_bad()) is not None:
            text = f"{bad.step:012d} {', '.join(bad.tile_ids)}".encode()[:NAMES]
            told[self.rank, : len(text)] = torch.tensor(list(text), device=self.device)
        rows = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in self._all_reduce(told).tolist()]
        if any(rows):
            step, _, tiles = min(row for row in rows if row).partition(" ")
            raise TrainingError(
                f"epoch {epoch}, {phase} step {int(step)}: the loss is not finite (tiles {tiles}): "
                "lower the learning rate, or look at these tiles"
            )


@dataclass(frozen=True)
class _Seen:
    """Which tiles a batch held, on the host."""

    step: int
    tile_ids: tuple[str, ...]


class _Tally:
    """Sums over an epoch, kept on the device: no step waits for the host."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(5, dtype=torch.float64, device=device)  # loss, tiles, overlap, predicted, true
        self._losses: list[Tensor] = []
        self._batches: list[_Seen] = []

    def add(self, batch: Batch, losses: Tensor, counted: Tensor, logits: Tensor, mask: Tensor, valid: Tensor) -> None:
        """Losses (N,) of a batch and its pixels; tiles with `counted` (N,) 0 are repeats and take no part."""
        true = mask * valid * counted[:, None, None, None]
        predicted = (logits >= 0) * valid * counted[:, None, None, None]
        pixels = [part.sum(dtype=torch.float64) for part in (predicted * true, predicted, true)]
        self._sums += torch.stack([(losses * counted).sum().double(), counted.sum().double(), *pixels])
        self._losses.append(losses)
        self._batches.append(_Seen(batch.step, batch.tile_ids))

    def first_bad(self) -> _Seen | None:
        """The first batch with a loss that is not finite. The only wait for the device, once an epoch."""
        if not self._losses:
            return None
        finite = torch.isfinite(torch.cat(self._losses)).cpu()
        parts = torch.split(finite, [len(seen.tile_ids) for seen in self._batches])
        return next((seen for seen, part in zip(self._batches, parts, strict=True) if not part.all()), None)

    def sums(self, all_reduce: AllReduce) -> tuple[float, ...]:
        """The sums over all ranks; this tally is spent."""
        return tuple(all_reduce(self._sums).tolist())

    def go_on(self, sums: tuple[float, ...]) -> None:
        """Add what an earlier part of the epoch gathered."""
        self._sums += torch.tensor(sums, dtype=self._sums.dtype, device=self._sums.device)

    def result(self, all_reduce: AllReduce) -> tuple[float, float, int]:
        """Mean loss over tiles and pooled Dice, over all ranks (NaN where there was nothing), and how many tiles."""
        loss, tiles, overlap, predicted, true = self.sums(all_reduce)
        dice = 2 * overlap / (predicted + true) if predicted + true else math.nan
        return loss / tiles if tiles else math.nan, dice, round(tiles)


def epochs_since_best(history: tuple[EpochRecord, ...]) -> int:
    """Epochs after the one with the highest validation Dice (the earlier of equals)."""
    if not history:
        return 0
    return history[-1].epoch - max(history, key=score).epoch


def _dropout_seed(seed: int, batch: Batch, rank: int) -> int:
    """63 bits that differ by step, micro batch and rank, the same whenever training gets there."""
    words = [seed, batch.epoch, batch.step, rank, batch.seeds[0]]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def rate_factor(config: TrainConfig, epoch: int, step: int, steps: int) -> float:
    """Share of the peak learning rate in a step: linear warm-up, then constant or half a cosine."""
    done = epoch + step / steps
    if done < config.warmup_epochs:
        return min(1.0, (done + 1 / steps) / config.warmup_epochs)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (done - config.warmup_epochs) / (config.epochs - config.warmup_epochs)))


def resolve_precision(precision: str, device: torch.device) -> bool:
    """Whether to autocast to bfloat16. `auto`: on GPUs and CPUs that have its arithmetic."""
    if precision == "auto":
        if device.type == "cuda":
            return bool(torch.cuda.is_bf16_supported())
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return precision == "bfloat16"


def describe_device(device: torch.device) -> str:
    """The device's name, for people who judge a run's times and numbers."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):  # Linux only; elsewhere the architecture must do
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"CPU, {line.partition(':')[2].strip()}"
    return f"CPU, {platform.machine()}"


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that `config` names; Adam and AdamW in their fused form."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=rate, weight_decay=decay)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(model.parameters(), lr=rate, weight_decay=decay, fused=True)
