"""Members: FCN-32, FCN-16 and FCN-8, trained at the same time where the cluster allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from apacs_ray.config.settings import Settings
from apacs_ray.config.training_settings import MemberName
from apacs_ray.models.pretrained import pretrained_member, pretrained_version
from apacs_ray.models.registry import MEMBERS
from apacs_ray.models.spec import ModelSpec
from apacs_ray.runs.markers import Counts
from apacs_ray.runs.provenance import fingerprint
from apacs_ray.stages.ingest_result import IngestResult
from apacs_ray.stages.stage import Committed, Job, Stage
from apacs_ray.stages.train_networks import (
    Network,
    TrainingResult,
    forget_state,
    read_indices,
    train_networks,
    weights_hold,
)
from apacs_ray.storage import Store


@dataclass(frozen=True)
class TrainMembers(Stage[TrainingResult]):
    """Train the three members on the tiles."""

    name: ClassVar[str] = "train_members"
    script: ClassVar[str] = "train_members.py"
    folder: ClassVar[str] = "members"
    result_type: ClassVar[type[TrainingResult]] = TrainingResult

    ingest: Committed[IngestResult]

    def fingerprint(self, settings: Settings) -> str:
        """Return the fingerprint of the tiles, the members' settings and the weights they start from."""
        return fingerprint(
            stage=self.name,
            tiles=self.ingest.fingerprint,
            members=settings.members.fingerprint_inputs(),
            start={name: pretrained_version(settings.members, name) for name in MEMBERS},
            seed=settings.run.seed,
        )

    def work(self, job: Job, fingerprint: str) -> TrainingResult:
        """Leave each member in `members/<name>`."""
        read_indices(job.store, ("test",))  # hours of training end in an evaluation: its tiles must be there
        trained = train_networks(
            job, _networks(job.settings), fingerprint, self.ingest.fingerprint, self.ingest.result.mpp
        )
        return TrainingResult(Counts(len(trained), len(trained)), trained)

    def holds(self, store: Store, result: TrainingResult) -> bool:
        """Return whether the weights are those that were committed."""
        return weights_hold(store, result)

    def tidy(self, store: Store, fingerprint: str) -> None:
        """Delete the training state."""
        forget_state(store, [member_folder(name) for name in MEMBERS])


def member_folder(name: str) -> str:
    """Return the folder of a member's model in a run."""
    return f"members/{name}"


def member_network(settings: Settings, name: MemberName, folder: str) -> Network:
    """Return one member as the settings describe it, its model to lie in `folder`."""
    members = settings.members
    spec = ModelSpec("member", name, width=members.width, dropout=members.dropout)
    return Network(name, spec, folder, members, pretrained=lambda: pretrained_member(members, name))


def _networks(settings: Settings) -> list[Network]:
    return [member_network(settings, name, member_folder(name)) for name in MEMBERS]
