"""A sweep of the fusion's hyperparameters, as `tune_configs/*.yaml` describes it. No Ray here."""

from __future__ import annotations

import importlib.util
import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from apacs_ray.config.section import NOT_IN_FINGERPRINT, Section
from apacs_ray.config.settings import Settings
from apacs_ray.config.training_settings import FusionSettings
from apacs_ray.config.yaml import find_config, read_yaml
from apacs_ray.errors import UsageError

SWEPT = (
    "learning_rate",
    "weight_decay",
    "dropout",
    "dice_weight",
    "members",
    "heatmap_init",
    "trunk",
    "head",
    "jitter",
    "stain",
    "ignore_band",
    "boundary_weight",
    "ema",
    "batch_size",
)
MUTABLE = ("learning_rate", "weight_decay", "dropout", "dice_weight", "jitter")  # that training may change on its way
DISTRIBUTIONS = ("uniform", "loguniform", "quniform", "randint", "choice", "grid")


class Distribution(Section):
    """How one setting is drawn: `{loguniform: [1e-4, 1e-2]}`, `{choice: [a, b]}`, `{grid: [a, b]}` ..."""

    kind: Literal["uniform", "loguniform", "quniform", "randint", "choice", "grid"]
    values: tuple[Any, ...]

    @model_validator(mode="before")
    @classmethod
    def _one_key(cls, tree: Any) -> Any:
        if not isinstance(tree, dict) or len(tree) != 1 or not isinstance(next(iter(tree.values())), list):
            raise ValueError(f"expected one of {', '.join(DISTRIBUTIONS)} with a list, such as {{choice: [1, 2]}}")
        ((kind, values),) = tree.items()
        return {"kind": kind, "values": values}

    @model_validator(mode="after")
    def _bounds(self) -> Distribution:
        sizes = {"uniform": 2, "loguniform": 2, "quniform": 3, "randint": 2}
        if self.kind in sizes:
            if len(self.values) != sizes[self.kind]:
                raise ValueError(f"{self.kind} takes {sizes[self.kind]} numbers, not {len(self.values)}")
            try:
                numbers = tuple(float(value) for value in self.values)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{self.kind} {list(self.values)}: not numbers") from error
            if numbers[0] >= numbers[1] or (self.kind == "loguniform" and numbers[0] <= 0):
                raise ValueError(f"{self.kind} {list(self.values)}: not an increasing (positive) range")
            if self.kind == "quniform" and numbers[2] <= 0:
                raise ValueError(f"quniform {list(self.values)}: its step, the last number, must be above 0")
            if self.kind == "randint" and any(number != int(number) for number in numbers):
                raise ValueError(f"randint {list(self.values)}: not whole numbers")
            object.__setattr__(self, "values", numbers)
        elif not self.values:
            raise ValueError(f"{self.kind} needs at least one value")
        return self

    def ends(self) -> tuple[Any, ...]:
        """Return the values that every drawn one lies between, or all there are; for checking against the settings."""
        return self.values[:2] if self.kind not in ("choice", "grid") else self.values

    def between(self) -> tuple[float, ...]:
        """Return a value as it is drawn between the ends: a fraction, where fractions are drawn."""
        if self.kind in ("uniform", "loguniform"):
            low, high = self.values
            return (low + 0.3819 * (high - low),)
        return (self.values[0] + self.values[2],) if self.kind == "quniform" else ()


class Scheduler(Section):
    """Which trials are stopped early (`async_hyperband`, that is ASHA), go on from better ones (`pbt`), or neither."""

    kind: Literal["async_hyperband", "pbt", "fifo"] = "fifo"
    grace_period: int = Field(1, ge=1, description="epochs every trial gets")
    reduction_factor: float = Field(3, gt=1, description="one in so many trials goes on at each rung")
    interval: int = Field(2, ge=1, description="pbt: epochs between looks at the population")


class Resources(Section):
    """What one trial asks for: one process, or with `workers` a trainer of so many, each with `cpu` and `gpu`.

    `gpu` counts only where the cluster has GPUs. There a trial has at least the CPUs that its share of a GPU has of
    the node's: with a quarter of one of 4 GPUs, beside 48 CPUs, 3.
    """

    cpu: float = Field(1, gt=0, description="at least, where it has a share of a GPU")
    gpu: float = Field(0.25, ge=0, le=1)
    workers: int = Field(1, ge=1, description="DDP workers of a trial; 1: a single process, which shares GPUs best")


class Sweep(Section):
    """One sweep, as a YAML file describes it."""

    trials: int = Field(ge=1)
    epochs: int = Field(ge=1, description="of a trial at most")
    concurrency: Annotated[int, NOT_IN_FINGERPRINT] = Field(
        0, ge=0, description="trials at a time; 0: as the cluster allows"
    )
    searcher: Literal["random", "optuna"] = "random"
    scheduler: Scheduler = Scheduler()
    resources: Annotated[Resources, NOT_IN_FINGERPRINT] = Resources()
    space: dict[str, Distribution]

    @model_validator(mode="after")
    def _parts_fit(self) -> Sweep:
        grids = [name for name, drawn in self.space.items() if drawn.kind == "grid"]
        if self.searcher == "optuna" and grids:
            raise ValueError(f"searcher optuna draws for itself and takes no grid ({', '.join(grids)})")
        if self.scheduler.kind == "pbt":
            if self.searcher != "random":
                raise ValueError("scheduler pbt changes settings for itself: give searcher random")
            if self.resources.workers > 1:
                raise ValueError("scheduler pbt copies trials of one process only: give resources.workers 1")
            if not set(self.space) & set(MUTABLE):
                raise ValueError(f"scheduler pbt changes {', '.join(MUTABLE)} on the way; none is in the space")
        return self

    @property
    def trials_in_all(self) -> int:
        """How many trials there will be: each of `trials` for every combination of the grids."""
        grids = [len(drawn.values) for drawn in self.space.values() if drawn.kind == "grid"]
        return self.trials * math.prod(grids)

    @property
    def trunks(self) -> tuple[str, ...]:
        """Initial weights of the trunk that trials may draw."""
        return self.space["trunk"].values if "trunk" in self.space else ()

    @field_validator("space")
    @classmethod
    def _known_and_possible(cls, space: dict[str, Distribution]) -> dict[str, Distribution]:
        unknown = sorted(set(space) - set(SWEPT))
        if unknown or not space:
            raise ValueError(f"cannot be swept: {unknown}; choose from {', '.join(SWEPT)}")
        for name, distribution in space.items():
            for value in (*distribution.ends(), *distribution.between()):
                FusionSettings.model_validate({name: value})
        return space


def read_sweep(name: str) -> Sweep:
    """Read the sweep in a YAML file.

    Args:
        name: The file, looked up like `--config`.

    Returns:
        The sweep, validated.

    Raises:
        UsageError: There is no such file, or it is no sweep; names file and key.
    """
    path = find_config(name)
    try:
        return Sweep.model_validate(read_yaml(path))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"{path}: {key}: {first['msg'].removeprefix('Value error, ')}") from error


def require_sweep(settings: Settings) -> None:
    """Refuse a sweep that cannot run, which would be found when the members are trained, hours later.

    Raises:
        UsageError: The settings ask for a sweep, and it is missing, impossible, or does not fit the networks' widths.
    """
    tune = settings.tune
    if not settings.fusion.from_best:
        return
    try:
        sweep = read_sweep(tune.config)
    except UsageError as error:
        raise UsageError(f"tune.config: {error}") from error
    if settings.fusion.warmup_epochs > sweep.epochs:
        raise UsageError(
            f"fusion.warmup_epochs: {settings.fusion.warmup_epochs:g} are more than the {sweep.epochs} epochs that "
            f"{tune.config} gives a trial"
        )
    for name, distribution in sweep.space.items():
        for value in distribution.ends():
            try:
                FusionSettings.model_validate({**settings.fusion.model_dump(), name: value})
            except ValidationError as error:
                reason = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise UsageError(f"tune.config: {tune.config}: draws {name} {value}, but fusion.{reason}") from error
    if settings.fusion.init == "published" and "members" in sweep.space:
        raise UsageError(f"tune.config: {tune.config}: draws members, but a released fusion is of some; leave it out")
    if "fcn32" in sweep.trunks and settings.fusion.width != settings.members.width:
        raise UsageError(f"tune.config: {tune.config}: trunk fcn32 needs fusion.width as members.width; leave it out")
    if sweep.searcher == "optuna" and importlib.util.find_spec("optuna") is None:
        raise UsageError(f"tune.config: {tune.config}: searcher optuna needs the package: pip install '.[optuna]'")
