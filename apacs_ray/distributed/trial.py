"""One trial of a sweep: a fusion network that learns from stored heatmaps, in one process or by DDP workers of its own.

A trial of one process starts nothing, so such trials cannot wait for each other; they share GPUs by fractions. A trial
of several workers holds next to nothing itself and starts a `TorchTrainer`; the plan says how many fit at a time. Both
kinds go on from their last epoch when they are restored, and from the step that they were at when their node is to be
taken away.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apacs_ray.config.settings import FusionSettings
from apacs_ray.data.shards import TileIndex
from apacs_ray.distributed.preemption import NodeNotice
from apacs_ray.distributed.resource_plan import NetworkPlan
from apacs_ray.distributed.train import NetworkTask, TrainingTask, fit
from apacs_ray.errors import ApacsError, gpu_too_small
from apacs_ray.models.spec import fusion_spec
from apacs_ray.runs.provenance import require_source
from apacs_ray.storage import Store
from apacs_ray.training.config import TrainConfig
from apacs_ray.training.dataset import Crop, Feed, Heatmaps, in_memory, one_by_one
from apacs_ray.training.tensorboard import write_curves

TRIAL_CURVES = "tune"
IN_MEMORY = 2**30  # bytes of decoded tiles that a trial may keep


@dataclass(frozen=True)
class TrialTask:
    """What all trials have in common. With `plan` each trains by DDP workers; `state` is their folder in the run."""

    store: Store
    indices: dict[str, TileIndex]
    fusion: FusionSettings
    width: float
    heatmaps: str
    epochs: int
    seed: int
    threads: int
    source: str
    state: str
    max_failures: int
    plan: NetworkPlan | None = None

    def settings(self, config: dict[str, Any]) -> FusionSettings:
        """The fusion's settings with those that Ray Tune drew."""
        return FusionSettings.model_validate({**self.fusion.model_dump(), **plain_setting(config)})

    def training(self, settings: FusionSettings) -> TrainConfig:
        """How a trial trains; when it ends is the scheduler's matter."""
        return replace(TrainConfig.of(settings, self.seed, epochs=self.epochs), patience=0)

    def feed(self, settings: FusionSettings) -> Feed:
        """The samples of a trial."""
        heatmaps = Heatmaps(settings.members, self.heatmaps)
        return Feed(self.store, heatmaps, Crop(settings.crop, settings.flips, settings.turns))


def plain_setting(config: dict[str, Any]) -> dict[str, Any]:
    """A trial's setting as `FusionSettings` takes it: members as a list again."""
    return {name: value.split("+") if name == "members" else value for name, value in config.items()}


def run_trial(config: dict[str, Any], task: TrialTask) -> None:
    """What Ray Tune calls with the setting it drew."""
    require_source(task.source)
    settings = task.settings(config)
    if task.plan is None:
        _in_this_process(config, settings, task)
    else:
        _by_workers(config, settings, task, task.plan)


def _curves() -> str:
    """The name of this trial's curves."""
    from ray import tune

    return f"{TRIAL_CURVES}/{tune.get_context().get_trial_id()}"


def _by_workers(config: dict[str, Any], settings: FusionSettings, task: TrialTask, plan: NetworkPlan) -> None:
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    from apacs_ray.models.start import fusion_weights

    state = f"{task.state}/trials/{tune.get_context().get_trial_id()}"
    spec = fusion_spec(settings, task.width)
    start = None
    if (weights := fusion_weights(task.store, spec, settings.trunk, task.seed)) is not None:
        start = f"{state}/start.safetensors"
        task.store.write(start, weights)
    network = NetworkTask("fusion", spec, task.training(settings), state, _curves(), start, config)
    training = TrainingTask((network,), task.feed(settings), task.indices, plan, task.max_failures, task.source)
    fit(training, [TuneReportCallback()])


def _in_this_process(config: dict[str, Any], settings: FusionSettings, task: TrialTask) -> None:
    import torch
    from ray import tune

    from apacs_ray.models.start import fusion_weights
    from apacs_ray.models.weights import build, load_model
    from apacs_ray.training.history import EpochRecord, told
    from apacs_ray.training.loop import Trainer, train_epochs
    from apacs_ray.training.sampler import schedule
    from apacs_ray.training.state import save_state

    torch.set_num_threads(task.threads)
    spec, how = fusion_spec(settings, task.width), task.training(settings)
    weights = fusion_weights(task.store, spec, settings.trunk, task.seed)
    torch.manual_seed(task.seed)
    network = build(spec) if weights is None else load_model(weights, spec)
    trainer = Trainer(network, how, device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with contextlib.ExitStack() as stack:
        checkpoint = tune.get_checkpoint()
        if checkpoint is not None:
            trainer.resume(Path(stack.enter_context(checkpoint.as_directory())))
            for group in trainer.optimizer.param_groups:  # PBT may have changed it since
                group["weight_decay"] = how.weight_decay
    train_index, val_index = task.indices["train"], task.indices["val"]
    epoch, step = trainer.place
    refs = schedule(
        train_index.groups(),
        len(val_index),
        epochs=range(epoch, task.epochs),
        first_step=step,
        batch_size=settings.batch_size,
        rank=0,
        world=1,
        seed=task.seed,
    )
    size = (len(train_index) + len(val_index)) * max(train_index.largest, val_index.largest) * 7
    samples = (in_memory if size <= IN_MEMORY else one_by_one)(task.feed(settings), task.indices, refs)

    curves = _curves()

    def report() -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_state(Path(folder), trainer.state())
            tune.report(told(trainer.history), checkpoint=tune.Checkpoint.from_directory(folder))

    def on_epoch(_: Trainer, record: EpochRecord) -> None:
        write_curves(task.store, curves, trainer.history, config)
        report()

    notice = NodeNotice()
    steps = -(-len(train_index) // settings.batch_size)
    try:
        left = train_epochs([trainer], samples, steps, on_epoch, notice, (len(train_index), len(val_index)))
    except torch.OutOfMemoryError as error:
        raise ApacsError(
            f"{gpu_too_small(error, 'fusion')}; or let fewer trials share a GPU (resources.gpu)"
        ) from error
    if left:
        report()  # returns when Ray Tune knows of the checkpoint
        notice.await_end()
