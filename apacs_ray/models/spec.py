"""What a trained network is, as `model.json` says it. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from apacs_ray.config.settings import FusionSettings, HeatmapInit, MemberName
from apacs_ray.errors import ApacsError
from apacs_ray.models.registry import MEMBERS

Head = Literal["published", "refined"]


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

    def to_json(self) -> bytes:
        """Return the text of `model.json`."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False).encode()

    @classmethod
    def from_json(cls, content: bytes) -> ModelSpec:
        """Return what `model.json` says. Raises ApacsError when it is none."""
        try:
            spec = cls(**json.loads(content))
            if not (0 < spec.width <= 1 and 0 <= spec.dropout < 1 and set(spec.members) <= set(MEMBERS)):
                raise ValueError(f"width {spec.width}, dropout {spec.dropout}, members {spec.members}")
        except (ValueError, TypeError, RecursionError) as error:
            raise ApacsError(f"model.json: not a model description ({error})") from error
        return replace(spec, members=tuple(spec.members))


def fusion_spec(settings: FusionSettings, width: float, name: str = "fusion") -> ModelSpec:
    """Return the fusion network that settings describe."""
    return ModelSpec(
        "fusion",
        name,
        width=width,
        dropout=settings.dropout,
        head=settings.head,
        members=settings.members,
        heatmap_init=settings.heatmap_init,
    )
