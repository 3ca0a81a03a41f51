"""One trial of a sweep: a fusion network that learns from stored heatmaps, in one process or by DDP workers of its own.

A trial of one process starts nothing, so such trials cannot wait for each other; they share GPUs by fractions. A trial
of several workers holds next to nothing itself and starts a `TorchTrainer`; the plan says how many fit at a time. Both
kinds go on from their last epoch when they are restored, and from the step that they were at when their node is to be
taken away.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apacs_ray.config.training_settings import FusionSettings
from apacs_ray.data.shards import TileIndex
from apacs_ray.distributed.interruptions import NodeInterruptions
from apacs_ray.distributed.resource_plan import NetworkPlan
from apacs_ray.distributed.tasks import GPU_MEMORY
from apacs_ray.distributed.train import fit
from apacs_ray.distributed.worker import NetworkTask, TrainingTask, WorkerHooks, threads_ahead, train_worker
from apacs_ray.errors import ApacsError, StoreTroubleError, gpu_too_small, message_of
from apacs_ray.models.spec import FusionStart, fusion_spec
from apacs_ray.redact import redact
from apacs_ray.runs.provenance import require_source
from apacs_ray.storage import Store
from apacs_ray.training.augment import Augmentation
from apacs_ray.training.dataset import Heatmaps, TileDataset, in_memory, one_by_one
from apacs_ray.training.history import progress_metrics, unit_metrics
from apacs_ray.training.tensorboard import write_curves

if TYPE_CHECKING:
    from apacs_ray.training.batch import Sample
    from apacs_ray.training.loop import Trainer
    from apacs_ray.training.sampler import SampleRef

TRIAL_CURVES = "tune"
LONGEST_ERROR = 400  # characters of a trial's error that are kept
FAILURE = "failure"  # the metric that holds what a trial's setting is to blame for
ALONE = NetworkPlan("fusion", 1, 1.0, 0.0, 1, 0)
IN_MEMORY = 2**30  # bytes of decoded tiles that a trial may keep


@dataclass(frozen=True)
class TrialTask:
    """What all trials have in common. `state` is their folder in the run; the sweep fills in `plan`.

    `pretrained` is where the weights lie that all of them begin with; None: each as its setting says, a refined head
    as that of `starts` which is of its members.
    """

    store: Store
    indices: dict[str, TileIndex]
    fusion: FusionSettings
    width: float
    heatmaps: str
    epochs: int
    seed: int
    source: str
    state: str
    max_failures: int
    checkpoint_every: float  # s
    plan: NetworkPlan = ALONE
    pretrained: str | None = None
    starts: Mapping[str, FusionStart] = field(default_factory=dict)
    deterministic: bool = False

    def settings(self, config: dict[str, Any]) -> FusionSettings:
        """Return the fusion's settings with those that Ray Tune drew; the scheduler ends a trial early, no patience."""
        how = {"epochs": self.epochs, "patience": 0}
        return FusionSettings.model_validate({**self.fusion.model_dump(), **plain_setting(config), **how})

    def training(self, config: dict[str, Any], trial_id: str) -> TrainingTask:
        """Return the training of a trial, the weights that it begins with written to its folder in the run."""
        from apacs_ray.models.pretrained import pretrained_fusion

        settings = self.settings(config)
        state = f"{self.state}/trials/{trial_id}"
        spec = fusion_spec(settings, self.width, starts=self.starts)
        pretrained = self.pretrained
        if (
            pretrained is None
            and (weights := pretrained_fusion(self.store, spec, settings.trunk, self.seed)) is not None
        ):
            pretrained = f"{state}/pretrained.safetensors"
            self.store.write(pretrained, weights)
        network = NetworkTask("fusion", spec, settings, state, f"{TRIAL_CURVES}/{trial_id}", pretrained, config)
        augmentation = Augmentation(settings.crop, settings.flips, settings.turns)
        dataset = TileDataset(self.store, Heatmaps(settings.members, self.heatmaps), augmentation)
        return TrainingTask(
            (network,),
            dataset,
            self.indices,
            self.plan,
            self.seed,
            self.max_failures,
            self.source,
            self.checkpoint_every,
            by_unit=True,
            deterministic=self.deterministic,
        )


def plain_setting(config: dict[str, Any]) -> dict[str, Any]:
    """Return a trial's setting as `FusionSettings` takes it: members as a list again."""
    return {name: value.split("+") if name == "members" else value for name, value in config.items()}


def run_trial(config: dict[str, Any], task: TrialTask) -> None:
    """Train one trial; Ray Tune calls this with the setting it drew.

    What its setting is to blame for, as a loss that is not finite, would come again: it is reported as the trial's
    last result, under `FAILURE`. An exception would make Ray Tune try again, as for a lost worker.

    Raises:
        StoreTroubleError: Another try, later, may have better luck.
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    require_source(task.source)
    os.environ.update(GPU_MEMORY)  # Ray Tune starts trials without variables of their own
    training = task.training(config, tune.get_context().get_trial_id())
    try:
        if task.plan.workers == 1:
            _in_this_process(training)
        else:
            fit(training, [TuneReportCallback()])
    except StoreTroubleError:
        raise
    except ApacsError as error:
        tune.report({**progress_metrics(()), FAILURE: str(error)})


def _in_this_process(task: TrainingTask) -> None:
    import torch

    from apacs_ray.training.device import default_device
    from apacs_ray.training.ranks import Ranks

    train, val = task.indices["train"], task.indices["val"]
    device = default_device()
    size = (len(train) + len(val)) * max(train.largest, val.largest) * 7

    def samples(refs: Iterator[SampleRef]) -> Iterator[Sample]:
        if size <= IN_MEMORY:
            return in_memory(task.dataset, task.indices, refs)
        return one_by_one(task.dataset, task.indices, refs, threads_ahead(task.plan, device))

    def on_epoch(trainer: Trainer, network: NetworkTask) -> None:
        write_curves(task.store, network.curves, trainer.history, network.setting)
        _report(trainer, network)
        interruptions.kept()

    interruptions = NodeInterruptions(task.checkpoint_every)
    hooks = WorkerHooks(
        wrap=lambda network: network,
        resume=_resume,
        samples=samples,
        on_epoch=on_epoch,
        on_part=_report,  # returns when Ray Tune knows of the checkpoint
        interruption=interruptions,
    )
    try:
        if not train_worker(task, hooks, device=device, ranks=Ranks()):
            interruptions.await_end()
    except torch.OutOfMemoryError as error:
        raise ApacsError(
            f"{gpu_too_small(error, 'fusion')}; or let fewer trials share a GPU (resources.gpu)"
        ) from error


def _resume(trainer: Trainer, network: NetworkTask) -> None:
    from ray import tune

    checkpoint = tune.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            trainer.resume(Path(folder))


def _report(trainer: Trainer, network: NetworkTask) -> None:
    """Give Ray Tune the metrics and a checkpoint."""
    from ray import tune

    from apacs_ray.training.state import save_state, snapshot

    with tempfile.TemporaryDirectory() as folder:
        save_state(Path(folder), snapshot(trainer.state()))
        metrics = progress_metrics(trainer.history) | unit_metrics(trainer.val_units)
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def error_line(error: object) -> str:
    """Return the last line of what ended a trial, its message, without secrets."""
    return redact(message_of(error))[:LONGEST_ERROR]
