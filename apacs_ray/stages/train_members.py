"""Members: FCN-32, FCN-16 and FCN-8, trained at the same time where the cluster allows."""

from __future__ import annotations

from apacs_ray.config.settings import MemberName
from apacs_ray.models.spec import MEMBERS, ModelSpec
from apacs_ray.runs.markers import Counts
from apacs_ray.runs.provenance import fingerprint
from apacs_ray.stages.pipeline import Context, Outcome, Stage
from apacs_ray.stages.start import start_version, start_weights
from apacs_ray.stages.train_networks import Network, forget_state, train_networks


def _fingerprint(context: Context) -> str:
    return fingerprint(
        stage="train_members",
        tiles=context.done("ingest").fingerprint,
        members=context.settings.members.model_dump(exclude={"workers", "mode"}),
        start={name: start_version(context.settings.members, name) for name in MEMBERS},
        seed=context.settings.run.seed,
    )


def member_network(context: Context, name: MemberName, folder: str) -> Network:
    """One member as the settings describe it, its model to lie in `folder`."""
    members = context.settings.members
    spec = ModelSpec("member", name, width=members.width, dropout=members.dropout)
    return Network(name, spec, folder, members, start=lambda: start_weights(members, name))


def _work(context: Context, mark: str) -> Outcome:
    networks = [member_network(context, name, f"members/{name}") for name in MEMBERS]
    facts = train_networks(context, networks, mark)
    counts = Counts(len(networks), len(networks))
    return Outcome(counts, facts, lambda: forget_state(context.run.store, networks, mark))


TRAIN_MEMBERS = Stage("train_members", "members", _fingerprint, _work)
