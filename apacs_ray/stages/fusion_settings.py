"""The fusion as it is trained: the settings, and over them the best of the sweep."""

from __future__ import annotations

from typing import Any

from apacs_ray.config.settings import FusionSettings
from apacs_ray.config.yaml import parse_yaml
from apacs_ray.stages.pipeline import Context

BEST = "tune/best.yaml"


def resolve_fusion(context: Context) -> FusionSettings:
    """`fusion.*`, overlaid with `tune/best.yaml` when `fusion.from_best` is set."""
    settings = context.settings.fusion
    if not settings.from_best:
        return settings
    return overlay(settings, parse_yaml(context.run.store.read_small(BEST).decode())["fusion"])


def overlay(settings: FusionSettings, best: dict[str, Any]) -> FusionSettings:
    """Settings with some of them replaced, validated again."""
    return FusionSettings.model_validate({**settings.model_dump(), **best})
