"""How networks are trained: the settings of the members and of the fusion.

Nothing here imports torch or Ray, so `--help` answers at once.
"""

from __future__ import annotations

import typing
from collections.abc import Collection
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from apacs_ray.config.section import NOT_IN_FINGERPRINT, Common, Section

MemberName = Literal["fcn32", "fcn16", "fcn8"]
HeatmapInit = Literal["random", "mean", "zero"]
Select = Literal["dice", "loss"]
Precision = Literal["float32", "tf32", "bfloat16"]
ADDED = (
    "select",
    "stain",
    "ignore_band",
    "boundary_weight",
    "ema",
    "deep_supervision",
)  # to training since runs have fingerprints


class TrainingSettings(Section):
    """What training the members and training the fusion have in common.

    In `Settings` the fusion has the members' value of each field that is not given for it, or given as None.
    """

    width: Common[float] = Field(
        1.0, gt=0, le=1, description="share of the published channel counts; 1.0: as published"
    )
    epochs: Common[int] = Field(100, ge=1, description="passes over the training tiles")
    batch_size: Common[int] = Field(4, ge=1, description="tiles a step, over all workers")
    accumulate: int = Field(1, ge=1, description="forward passes that share one step (less memory)")
    learning_rate: Common[float] = Field(1e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of the optimizer")
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adamw", description="optimizer of the weights")
    schedule: Literal["constant", "cosine"] = Field("cosine", description="of the learning rate after its peak")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs of linear warm-up")
    dice_weight: float = Field(0.5, ge=0, description="weight of the per-image soft Dice term beside BCE")
    crop: Common[int] = Field(1024, ge=0, description="px, side of the random training crop; 0: whole tiles")
    flips: bool = Field(True, description="augmentation: random flips of image and mask, both together")
    turns: bool = Field(True, description="augmentation: random turns by 90 degrees, both together")
    jitter: float = Field(0.1, ge=0, le=1, description="strength of the stain augmentation; 0: none")
    stain: float = Field(
        0.0, ge=0, le=1, description="augmentation: share by which the amounts of the dyes (HED) vary; 0: not at all"
    )
    ignore_band: int = Field(
        0, ge=0, le=16, description="px on either side of a label's edge that take no part in the loss; 0: all do"
    )
    boundary_weight: float = Field(
        0.0, ge=0, description="weight in the loss, beside 1, of px within 4 px of a label's edge; 0: none"
    )
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay a step of the moving average of weights, which is validated and kept; 0: the last weights",
    )
    dropout: float = Field(0.5, ge=0, lt=1, description="Dropout2d probability")
    precision: Precision | Literal["auto"] = Field(
        "auto", description="auto: bfloat16 autocast where the device computes it fast, else float32; tf32: on GPUs"
    )
    select: Select = Field(
        "dice", description="which epoch's weights are kept: of the highest val Dice, or of the lowest val loss"
    )
    patience: int = Field(
        15,
        ge=0,
        description="epochs without a better one (select), of a fusion than its start, before training stops; 0: never",
    )
    workers: Annotated[int, NOT_IN_FINGERPRINT] = Field(
        0, ge=0, description="DDP workers a network; 0: as the cluster allows"
    )

    @model_validator(mode="after")
    def _warm_up_ends(self) -> TrainingSettings:
        if self.warmup_epochs > self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs:g} are more than the {self.epochs} epochs")
        return self

    def fingerprint_inputs(self, *, exclude: Collection[str] = ()) -> dict[str, Any]:
        """Return the fields that a training depends on; later ones where they are not what they were before."""
        added = {name: field for name, field in type(self).model_fields.items() if name in ADDED}
        unchanged = {name for name, field in added.items() if getattr(self, name) == field.default}
        return super().fingerprint_inputs(exclude={*exclude, *unchanged})

    @field_validator("crop")
    @classmethod
    def _crop_fits_the_networks(cls, value: int) -> int:
        if 0 < value < 32:
            raise ValueError("the networks need at least 32 px (0: whole tiles)")
        return value


class MembersSettings(TrainingSettings):
    """The three members FCN-32, FCN-16 and FCN-8."""

    mode: Annotated[Literal["auto", "parallel", "together"], NOT_IN_FINGERPRINT] = Field(
        "auto",
        description="parallel: a training run for each member at the same time; together: one run steps all three on "
        "each batch; auto: together on one GPU or one CPU",
    )
    init: Common[Literal["random", "imagenet", "published"]] = Field(
        "random",
        description="initial weights: random, imagenet (AlexNet, VGG-16 of torchvision) or published (released)",
    )
    checkpoint: str | None = Field(
        None,
        description="URI of a folder with alexnet.pth and vgg16.pth (imagenet; default: torchvision downloads them) or "
        "fcn32.pth, fcn16.pth and fcn8.pth (published)",
    )

    deep_supervision: float = Field(
        0.0,
        ge=0,
        description="weight in the loss of what FCN-16 and FCN-8 say before each score of a pool joins; 0: none",
    )

    @model_validator(mode="after")
    def _pretrained_weights_fit(self) -> MembersSettings:
        if self.init != "random" and self.width != 1.0:
            raise ValueError(f"init {self.init} needs width 1.0, not {self.width}")
        if self.init == "published" and self.checkpoint is None:
            raise ValueError("init published needs checkpoint, the folder of the released files")
        return self


class FusionSettings(TrainingSettings):
    """The fusion network on RGB and the members' heatmaps, trained as the members are where nothing else is given."""

    head: Common[Literal["published", "refined"]] = Field(
        "refined",
        description="published: as released; refined: finer skips and a residual onto the members' best combination",
    )
    members: tuple[MemberName, ...] = Field(
        ("fcn32", "fcn16", "fcn8"), description="members whose heatmaps it reads (two or all three)"
    )
    heatmap_init: HeatmapInit = Field("random", description="initial weights of the first layer for heatmaps")
    init: Literal["random", "published"] = Field(
        "random", description="initial weights: random, or published (a released fusion; as its head, of width 1.0)"
    )
    checkpoint: str | None = Field(None, description="URI of the released fusion's file, such as fusion.pth")
    trunk: Literal["random", "fcn32"] = Field(
        "random", description="initial weights of the trunk: random, or those of the trained FCN-32 (of the same width)"
    )
    from_best: Common[Annotated[bool, NOT_IN_FINGERPRINT]] = Field(
        True, description="train with the best setting of the sweep"
    )
    compare: Annotated[bool, NOT_IN_FINGERPRINT] = Field(
        False, description="train and evaluate the published head as well"
    )

    @model_validator(mode="after")
    def _published_weights_fit(self) -> FusionSettings:
        if self.init == "published":
            wanted = {"width": 1.0, "head": "published", "trunk": "random", "heatmap_init": "random"}
            for name, value in wanted.items():
                if getattr(self, name) != value:
                    raise ValueError(f"init published needs {name} {value}, not {getattr(self, name)}")
            if self.checkpoint is None:
                raise ValueError("init published needs checkpoint, the released file")
        return self

    @field_validator("members")
    @classmethod
    def _two_or_three(cls, value: tuple[MemberName, ...]) -> tuple[MemberName, ...]:
        order = typing.get_args(MemberName)
        if len(set(value)) != len(value) or len(value) < 2:
            raise ValueError(f"two or more different members of {', '.join(order)}")
        return tuple(sorted(value, key=order.index))
