"""The training worker: networks learn from one stream of samples, from their newest checkpoints to the end.

A DDP worker of Ray Train runs it, and so does a trial of Ray Tune in one process: they differ in where checkpoints and
metrics go, and in who says that the node is to be taken away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from apacs_ray.config.training_settings import TrainingSettings
from apacs_ray.data.shards import TileIndex
from apacs_ray.distributed.resource_plan import NetworkPlan
from apacs_ray.evaluation.selection import unit_numbers
from apacs_ray.models.spec import ModelSpec
from apacs_ray.runs.provenance import require_source
from apacs_ray.storage import Store
from apacs_ray.training.batch import micro_batch_size
from apacs_ray.training.dataset import TileDataset
from apacs_ray.training.history import start_record
from apacs_ray.training.sampler import schedule

if TYPE_CHECKING:
    import torch
    from torch import nn

    from apacs_ray.training.batch import Sample
    from apacs_ray.training.interruption import Interruption
    from apacs_ray.training.loop import Trainer
    from apacs_ray.training.ranks import Ranks
    from apacs_ray.training.sampler import SampleRef
    from apacs_ray.training.speed import Speed


@dataclass(frozen=True)
class NetworkTask:
    """One network to train.

    `spec` builds it, `settings` say how it learns, `state` is the folder of its checkpoints in the run, `curves` the
    name of its curves, `pretrained` the safetensors it begins with (None: random), and `setting` what a sweep drew,
    to be shown beside the curves.
    """

    name: str
    spec: ModelSpec
    settings: TrainingSettings
    state: str
    curves: str
    pretrained: str | None = None
    setting: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TrainingTask:
    """Everything the workers of one training need: networks that learn from one stream of samples, with one seed."""

    networks: tuple[NetworkTask, ...]
    dataset: TileDataset
    indices: dict[str, TileIndex]
    plan: NetworkPlan
    seed: int
    max_failures: int
    source: str
    checkpoint_every: float  # s
    attempt: int = 0
    deterministic: bool = False
    by_unit: bool = False  # count what is found in validation by slide, or by groups of tiles, too
    compiled: bool = False  # the trunks, where that is possible

    @property
    def store(self) -> Store:
        """The run."""
        return self.dataset.store

    @property
    def state(self) -> str:
        """The folder of Ray's own state and of what workers tell the driver."""
        return self.networks[0].state

    @property
    def name(self) -> str:
        """The names of its networks, for people."""
        return ", ".join(network.name for network in self.networks)


@dataclass(frozen=True)
class WorkerHooks:
    """What differs between a worker of Ray Train and a trial in one process."""

    wrap: Callable[[nn.Module], nn.Module]  # a network that lies on its device: in DDP, or not at all
    resume: Callable[[Trainer, NetworkTask], None]  # from the newest checkpoint, where there is one
    samples: Callable[[Iterator[SampleRef]], Iterator[Sample]]
    on_epoch: Callable[[Trainer, NetworkTask], None]  # checkpoint, curves and metrics of an epoch that has ended
    on_part: Callable[[Trainer, NetworkTask], None]  # a checkpoint in the middle of an epoch
    interruption: Callable[[], Interruption | None]  # asked after every step


def train_worker(task: TrainingTask, hooks: WorkerHooks, *, device: torch.device, ranks: Ranks) -> bool:
    """Train the networks of `task` as one of its workers.

    Args:
        task: What to train.
        hooks: Where checkpoints and metrics go.
        device: The device of this worker.
        ranks: This worker among all.

    Returns:
        Whether training came to its end; if not, a node is to be taken away.

    Raises:
        ApacsError: As `training.loop.train_epochs`, or for weights that do not fit.
    """
    import torch

    from apacs_ray.training.device import set_arithmetic
    from apacs_ray.training.loop import Trainer, earliest_place, train_epochs
    from apacs_ray.training.speed import compile_trunk

    require_source(task.source)
    torch.set_num_threads(task.plan.threads)
    set_arithmetic(task.networks[0].settings.precision, deterministic=task.deterministic)
    train, val = task.indices["train"], task.indices["val"]
    settings = task.networks[0].settings
    micro_batch = _micro_batch(task, device, ranks)
    speed = _speed(task, device, ranks, micro_batch)
    tasks: dict[Trainer, NetworkTask] = {}
    units = unit_numbers(val.slide_ids, val.tile_ids) if task.by_unit else None
    for network in task.networks:
        bare = initial_network(task, network).to(device)
        if speed.compiled:
            compile_trunk(bare)
        start = start_record(network.spec.start, network.settings.dice_weight)
        trainer = Trainer(
            hooks.wrap(bare),
            network.settings,
            seed=task.seed,
            device=device,
            ranks=ranks,
            start=start,
            units=units,
            speed=speed,
        )
        hooks.resume(trainer, network)
        tasks[trainer] = network
    trainers = list(tasks)
    epoch, step = earliest_place(trainers)
    refs = schedule(
        train.groups(),
        len(val),
        epochs=range(epoch, settings.epochs),
        first_step=step,
        batch_size=settings.batch_size,
        rank=ranks.rank,
        world=ranks.world,
        seed=task.seed,
    )
    return train_epochs(
        trainers,
        hooks.samples(refs),
        -(-len(train) // settings.batch_size),
        lambda trainer, _: hooks.on_epoch(trainer, tasks[trainer]),
        hooks.interruption,
        lambda trainer: hooks.on_part(trainer, tasks[trainer]),
        (len(train), len(val)),
        micro_batch,
    )


def _speed(task: TrainingTask, device: torch.device, ranks: Ranks, micro_batch: int | None) -> Speed:
    """What makes the steps of a training faster, of batches of `micro_batch` (None: as the settings say)."""
    from apacs_ray.training.speed import plan_speed

    settings, train = task.networks[0].settings, task.indices["train"]
    return plan_speed(
        settings,
        device,
        largest=train.largest,
        tiles=len(train),
        batch=-(-settings.batch_size // ranks.world),
        micro_batch=micro_batch or micro_batch_size(settings, ranks.world),
        deterministic=task.deterministic,
        compiled=task.compiled,
    )


def threads_ahead(plan: NetworkPlan, device: torch.device) -> int:
    """Return how many threads read ahead of a worker that decodes alone: without a GPU they have to compute."""
    return plan.threads if device.type == "cuda" else 0


def _micro_batch(task: TrainingTask, device: torch.device, ranks: Ranks) -> int | None:
    """How many tiles may pass a network at once: fewer than the settings say where a GPU's memory is too small."""
    import torch

    from apacs_ray.models.weights import build
    from apacs_ray.training.device import uses_bfloat16
    from apacs_ray.training.memory import fitting_batch, input_side

    if device.type != "cuda":
        return None
    settings = task.networks[0].settings
    side = input_side(settings.crop, task.indices["train"].largest)
    channels = 3 + (len(task.dataset.heatmaps.members) if task.dataset.heatmaps else 0)
    fitting = fitting_batch(
        [partial(build, network.spec) for network in task.networks],
        (micro_batch_size(settings, ranks.world), channels, side, side),
        half=uses_bfloat16(settings.precision, device),
        memory=torch.cuda.get_device_properties(device).total_memory * min(1.0, task.plan.gpus or 1.0),
        averaged=settings.ema > 0,
    )
    return min(ranks.all_gather(fitting))


def initial_network(task: TrainingTask, network: NetworkTask) -> nn.Module:
    """Return the network as its training starts, laid out before DDP wraps it: a later change gives wrong gradients."""
    import torch

    from apacs_ray.models.weights import build, load_model

    torch.manual_seed(task.seed)
    if network.pretrained is None:
        model = build(network.spec)
    else:
        model = load_model(task.store.read(network.pretrained), network.spec)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
