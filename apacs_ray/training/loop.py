"""The epoch loop: steps on a stream of samples, validation, history and early stopping. No Ray, no data formats."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from apacs_ray.config.training_settings import TrainingSettings
from apacs_ray.errors import ApacsError, TrainingError
from apacs_ray.training.batch import Batch, Sample, batches, micro_batch_size
from apacs_ray.training.history import EpochPart, EpochRecord, epochs_since_best
from apacs_ray.training.interruption import Interruption
from apacs_ray.training.optim import average_weights, ema_decay, learning_rate, make_optimizer
from apacs_ray.training.ranks import Ranks
from apacs_ray.training.speed import PLAIN, Speed
from apacs_ray.training.state import TrainState, bare_model, load_state
from apacs_ray.training.step import backward, forward, update
from apacs_ray.training.tally import EpochTally


def train_epochs(
    trainers: Sequence[Trainer],
    samples: Iterator[Sample],
    steps: int,
    on_epoch: Callable[[Trainer, EpochRecord], None],
    interruption: Callable[[], Interruption | None] = lambda: None,
    on_part: Callable[[Trainer], None] = lambda _: None,
    tiles: tuple[int, int] | None = None,
    micro_batch: int | None = None,
) -> bool:
    """Train networks on one stream of samples, each batch made once and given to all, until all are finished.

    A network that is ahead (training was killed between two checkpoints) waits for the others. All must have the same
    batch settings.

    Args:
        trainers: The networks.
        samples: The stream; it begins at the `earliest_place`.
        steps: How many an epoch has.
        on_epoch: Called after each epoch of each network; it does not see an epoch that raised an error.
        interruption: Asked after every step; all ranks must hear the same.
        on_part: Called with each network that is in the middle of an epoch, which its `state` then holds, at an
            interruption.
        tiles: How many training and validation tiles must come in an epoch, each once, to the ranks together.
        micro_batch: Tiles that pass a network at once; None: as the settings say.

    Returns:
        Whether all are finished; if not, an interruption said to leave.

    Raises:
        ApacsError: A loss is not finite (it names the tiles), the stream lacks steps, or other tiles came than `tiles`.
    """
    (wanted,) = {micro_batch_size(trainer.settings, trainer.ranks.world) for trainer in trainers}
    stream = batches(samples, micro_batch or wanted)
    batch = next(stream, None)
    while active := [trainer for trainer in trainers if not trainer.finished()]:
        epoch, first = earliest_place(active)
        done = first
        learning = [trainer for trainer in active if trainer.next_epoch == epoch]
        for trainer in learning:
            trainer.begin_epoch()
        while batch is not None and batch.epoch == epoch:
            for trainer in learning:
                trainer.take(batch, steps)
            stepped = batch.phase == "train" and batch.ends_step
            done += stepped and batch.step >= first
            if stepped and (now := interruption()) is not None:
                for trainer in learning:
                    trainer.note_part()
                    on_part(trainer)
                if now is Interruption.LEAVE:
                    return False
            batch = next(stream, None)
        if done != steps:
            raise ApacsError(f"epoch {epoch}: {done} of {steps} steps arrived: training data was lost on its way")
        for trainer in learning:
            on_epoch(trainer, trainer.end_epoch(tiles))
    return True


def earliest_place(trainers: Sequence[Trainer]) -> tuple[int, int]:
    """Return epoch and step with which the stream of `trainers` begins; behind the last epoch when all are finished."""
    places = [trainer.place for trainer in trainers if not trainer.finished()]
    return min(places, default=(max(trainer.settings.epochs for trainer in trainers), 0))


class Trainer:
    """One network in training on one device, as one of the DDP workers `ranks` where `model` is wrapped.

    A bare model is moved to `device` and to channels_last. A wrapped one must already be there: DDP lays out
    its gradient buckets when it wraps, and a layout changed afterwards gives wrong gradients.

    `start` is what validation says of the network as it is: an epoch that is worse does not count as a better one.
    With `units`, the unit of each validation tile, `val_units` holds the counts of the last epoch.
    With `settings.ema`, `average` is the same network with the moving average of its weights, which is what is
    validated and kept.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainingSettings,
        *,
        seed: int,
        device: torch.device,
        ranks: Ranks = Ranks(),  # noqa: B008 - frozen
        start: EpochRecord | None = None,
        units: Mapping[str, int] | None = None,
        speed: Speed = PLAIN,
    ) -> None:
        wrapped = isinstance(model, nn.parallel.DistributedDataParallel)
        self.model = model if wrapped else model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.settings = settings
        self.seed = seed
        self.device = device
        self.ranks = ranks
        self._start = start
        self._units = units
        self.val_units: list[list[int]] = []  # of the last epoch, as `EpochTally.unit_counts` has them
        self.speed = speed
        self.optimizer = make_optimizer(self.model, settings)
        self.average = copy.deepcopy(bare_model(self.model)).eval() if settings.ema else None
        self.history: tuple[EpochRecord, ...] = ()
        self._part: EpochPart | None = None  # of the epoch in progress, from a checkpoint or for the next one

    def resume(self, folder: Path) -> None:
        """Go on from the checkpoint in `folder`, with the present settings. Raises ApacsError when it is damaged."""
        state = load_state(folder, self.model, self.optimizer, self.average)
        self.history, self._part = state.history, state.part
        for group in self.optimizer.param_groups:  # population based training may have changed it since
            group["weight_decay"] = self.settings.weight_decay

    @property
    def next_epoch(self) -> int:
        """The first epoch that is not done."""
        return self.history[-1].epoch + 1 if self.history else 0

    @property
    def place(self) -> tuple[int, int]:
        """The epoch and step with which training goes on."""
        return self.next_epoch, self._part.steps if self._part else 0

    def finished(self) -> bool:
        """Return whether the last epoch is done, or `patience` epochs passed since the best, which may be the start."""
        if self.next_epoch >= self.settings.epochs:
            return True
        judged = self.history if self._start is None else (self._start, *self.history)
        patience = self.settings.patience
        return bool(patience) and epochs_since_best(judged, self.settings.select) >= patience

    def run(
        self,
        samples: Iterator[Sample],
        steps: int,
        on_epoch: Callable[[EpochRecord, TrainState], None],
        tiles: tuple[int, int] | None = None,
    ) -> tuple[EpochRecord, ...]:
        """Train this network alone and return its history; see `train_epochs`."""
        train_epochs([self], samples, steps, lambda trainer, record: on_epoch(record, trainer.state()), tiles=tiles)
        return self.history

    def state(self) -> TrainState:
        """Return what a checkpoint holds."""
        return TrainState(self.model, self.optimizer, self.history, self._part, self.average)

    def begin_epoch(self) -> None:
        """Make ready for the batches of `next_epoch`."""
        part, self._part = self._part, None
        self._started = time.monotonic() - (part.seconds if part else 0.0)
        self._steps = part.steps if part else 0
        self._train, self._val = EpochTally(self.device), EpochTally(self.device, self._units)
        if part and self.ranks.rank == 0:  # they are the sums of all ranks
            self._train.add_sums(part.sums)
        self.model.train()

    def take(self, batch: Batch, steps: int) -> None:
        """Learn from a training batch (of an epoch of `steps`), or evaluate a validation batch.

        Steps that were done before the epoch was left are passed over.
        """
        if batch.phase == "val":
            self._validate(batch)
        elif batch.step >= self._steps:
            self._learn(batch, steps)
            self._steps += batch.ends_step

    def note_part(self) -> None:
        """Let `state` hold the epoch in progress, up to this step. Raises ApacsError as `end_epoch` does."""
        self._require_finite("train", self._train)
        seconds = round(time.monotonic() - self._started, 3)
        self._part = EpochPart(self.next_epoch, self._steps, self._train.sums(self.ranks), seconds)

    def end_epoch(self, tiles: tuple[int, int] | None = None) -> EpochRecord:
        """Close the epoch; its record joins the history.

        Raises:
            TrainingError: A tile's loss is not finite, or other training and validation tiles came than `tiles`.

        Returns:
            The record of the epoch.
        """
        epoch = self.next_epoch
        self._require_finite("train", self._train)
        self._require_finite("val", self._val)  # also meets weights that the epoch's last step broke
        train_loss, train_dice, trained = self._train.result(self.ranks)
        val_loss, val_dice, validated = self._val.result(self.ranks)
        self.val_units = self._val.unit_counts(self.ranks)
        if tiles is not None and (trained, validated) != tiles:
            raise TrainingError(
                f"epoch {epoch}: {trained} training and {validated} validation tiles came, not {tiles[0]} and "
                f"{tiles[1]} (a defect: please report it)"
            )
        rate = float(self.optimizer.param_groups[0]["lr"])
        seconds = round(time.monotonic() - self._started, 3)
        self._part = None
        record = EpochRecord(epoch, train_loss, train_dice, val_loss, val_dice, rate, seconds)
        self.history = (*self.history, record)
        return record

    def _learn(self, batch: Batch, steps: int) -> None:
        torch.manual_seed(_dropout_seed(self.seed, batch, self.ranks.rank))
        with self.speed.for_batch(batch):
            output = backward(self.model, batch, self.settings, self.device)
        self._train.add(batch, output, torch.from_numpy(batch.weight > 0).to(self.device).float())
        if batch.ends_step:
            update(self.optimizer, learning_rate(self.settings, batch.epoch, batch.step, steps))
            if self.average is not None:
                done = batch.epoch * steps + batch.step
                average_weights(self.average, bare_model(self.model), ema_decay(self.settings.ema, done))

    @torch.no_grad()
    def _validate(self, batch: Batch) -> None:
        self.model.eval()
        # without DDP's wrapper: ranks hold different numbers of tiles, so none may wait for another here
        with self.speed.for_batch(batch):
            output = forward(self.average or bare_model(self.model), batch, self.settings, self.device)
        self._val.add(batch, output, torch.ones_like(output.losses))

    def _require_finite(self, phase: str, tally: EpochTally) -> None:
        """Raise the same ApacsError on every rank when any rank met a loss that is not finite."""
        broken = [seen for seen in self.ranks.all_gather(tally.first_not_finite()) if seen is not None]
        if broken:
            first = min(broken)
            raise TrainingError(
                f"epoch {self.next_epoch}, {phase} step {first.step}: the loss is not finite "
                f"(tiles {', '.join(first.tile_ids)}): lower the learning rate, or look at these tiles"
            )


def _dropout_seed(seed: int, batch: Batch, rank: int) -> int:
    """63 bits that differ by step, micro batch and rank, the same whenever training gets there."""
    words = [seed, batch.epoch, batch.step, rank, batch.seeds[0]]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))
