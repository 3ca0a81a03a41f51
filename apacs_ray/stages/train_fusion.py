"""Fusion: trained on RGB and the stored heatmaps, with the best setting of the sweep."""

from __future__ import annotations

from collections.abc import Callable

from apacs_ray.config.settings import FusionSettings, Settings
from apacs_ray.console import say
from apacs_ray.models.spec import ModelSpec, fusion_spec
from apacs_ray.models.start import fusion_weights
from apacs_ray.runs.markers import Counts
from apacs_ray.runs.provenance import fingerprint
from apacs_ray.stages.fusion_settings import NOT_LEARNED, resolve_fusion
from apacs_ray.stages.pipeline import Context, Outcome, Stage
from apacs_ray.stages.train_networks import Network, forget_state, train_networks
from apacs_ray.training.dataset import Heatmaps

FOLDERS = {"fusion": "fusion", "fusion_published": "fusion_published"}


def fusion_folders(settings: Settings) -> dict[str, str]:
    """The fusions of a run by key: `fusion`, and with `fusion.compare` the published head as well."""
    return FOLDERS if settings.fusion.compare else {"fusion": FOLDERS["fusion"]}


def _fingerprint(context: Context) -> str:
    settings = context.settings
    return fingerprint(
        stage="train_fusion",
        heatmaps=context.done("heatmaps").fingerprint,
        fusion=resolve_fusion(context).model_dump(exclude=NOT_LEARNED),
        keys=sorted(fusion_folders(settings)),
        width=settings.fusion_width,
        seed=settings.run.seed,
    )


def fusion_specs(settings: Settings, fusion: FusionSettings) -> dict[str, tuple[FusionSettings, ModelSpec]]:
    """How the fusions of a run learn and what they are, by key, when `fusion` says how the first one does."""
    hows = {
        key: fusion if key == "fusion" else fusion.model_copy(update={"head": "published"})
        for key in fusion_folders(settings)
    }
    return {key: (how, fusion_spec(how, settings.fusion_width, key)) for key, how in hows.items()}


def _networks(context: Context, fusion: FusionSettings) -> list[Network]:
    networks = []
    for key, (how, spec) in fusion_specs(context.settings, fusion).items():
        heatmaps = Heatmaps(how.members, context.done("heatmaps").fingerprint)
        networks.append(Network(key, spec, FOLDERS[key], how, heatmaps, start=_start(context, spec, how)))
    return networks


def _start(context: Context, spec: ModelSpec, how: FusionSettings) -> Callable[[], bytes | None]:
    return lambda: fusion_weights(context.run.store, spec, how.trunk, context.settings.run.seed)


def _work(context: Context, mark: str) -> Outcome:
    fusion = resolve_fusion(context)
    plain = context.settings.fusion
    changed = [name for name in type(plain).model_fields if getattr(fusion, name) != getattr(plain, name)]
    if changed:
        shown = ", ".join(f"{name} {getattr(fusion, name)}" for name in changed)
        say(f"train_fusion: from the sweep: {shown} (--fusion.from_best false keeps your own)")
    networks = _networks(context, fusion)
    facts = train_networks(context, networks, mark)
    counts = Counts(len(networks), len(networks))
    return Outcome(counts, facts, lambda: forget_state(context.run.store, networks, mark))


TRAIN_FUSION = Stage("train_fusion", "fusion", _fingerprint, _work)
