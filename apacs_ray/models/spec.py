"""What a trained network is, as `model.json` says it. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from apacs_ray.config.settings import VIEWS
from apacs_ray.config.training_settings import FusionSettings, HeatmapInit, MemberName
from apacs_ray.errors import ApacsError
from apacs_ray.models.registry import MEMBERS

Head = Literal["published", "refined"]
CLAMP = 1 / 510  # heatmaps are stored as uint8: half a step away from 0 and 1 keeps the logit finite


@dataclass(frozen=True)
class FusionStart:
    """What a refined fusion adds its residual to: sum(weight * logit) / temperature + bias, of clamped logits.

    Attributes:
        name: A member's, `mean`, `weighted` or `fitted`.
        weights: By member, from 0, of sum 1.
        temperature: Above 0.
        bias: Logits.
        val_dice: Pooled over the validation tiles, in 0..1; None where it is not defined.
        val_entropy: Mean binary cross-entropy there, over tiles.
        val_soft_dice: Mean of 1 - soft Dice there, over tiles.
    """

    name: str
    weights: Mapping[str, float]
    temperature: float = 1.0
    bias: float = 0.0
    val_dice: float | None = None
    val_entropy: float = 0.0
    val_soft_dice: float = 0.0

    def val_loss(self, dice_weight: float) -> float:
        """Return its loss on the validation tiles, as `training.loss` defines it."""
        return self.val_entropy + dice_weight * self.val_soft_dice


@dataclass(frozen=True)
class ModelSpec:
    """What a weights file holds: enough to build the network again and to know where it came from."""

    kind: Literal["member", "fusion"]
    name: str
    width: float = 1.0
    dropout: float = 0.5
    head: Head = "refined"
    members: tuple[MemberName, ...] = MEMBERS
    heatmap_init: HeatmapInit = "random"
    threshold: float = 0.5  # probability from which a pixel is cell
    training_data: str = ""  # fingerprint of the tiles
    mpp: float | None = None  # um per px of the tiles; None where not known, or not all the same
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    views: int = 1  # of a picture, over which the logits of its members are averaged for a fusion
    start: FusionStart | None = None  # of a refined fusion; None: the mean, as in files of before there were others

    def to_json(self) -> bytes:
        """Return the text of `model.json`."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False).encode()

    @classmethod
    def from_json(cls, content: bytes) -> ModelSpec:
        """Return what `model.json` says. Raises ApacsError when it is none."""
        try:
            tree = json.loads(content)
            start = tree.get("start")
            spec = cls(**{**tree, "start": None if start is None else FusionStart(**start)})
            if not (
                0 < spec.width <= 1
                and 0 <= spec.dropout < 1
                and set(spec.members) <= set(MEMBERS)
                and spec.views in VIEWS
            ):
                raise ValueError(
                    f"width {spec.width}, dropout {spec.dropout}, members {spec.members}, views {spec.views}"
                )
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ApacsError(f"model.json: not a model description ({error})") from error
        return replace(spec, members=tuple(spec.members))


def fusion_spec(
    settings: FusionSettings, width: float, name: str = "fusion", starts: Mapping[str, FusionStart] | None = None
) -> ModelSpec:
    """Return the fusion network that settings describe; `starts` are those fitted, by `start_key`."""
    return ModelSpec(
        "fusion",
        name,
        width=width,
        dropout=settings.dropout,
        head=settings.head,
        members=settings.members,
        heatmap_init=settings.heatmap_init,
        start=(starts or {}).get(start_key(settings.members)) if settings.head == "refined" else None,
    )


def start_key(members: Sequence[str]) -> str:
    """Return the key of a start among those of all sets of members, such as `fcn16+fcn8`."""
    return "+".join(members)
