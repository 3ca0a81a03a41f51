"""The trained networks that a segmentation needs: of a finished run, or a folder with their files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from apacs_ray.config.settings import SegmentSettings
from apacs_ray.errors import UsageError
from apacs_ray.inference.halo import exact_halo
from apacs_ray.inference.predictor import read_weights
from apacs_ray.models.spec import ModelSpec
from apacs_ray.storage import Store

MODEL_JSON = "model.json"


@dataclass(frozen=True)
class ModelFiles:
    """Networks by key.

    Attributes:
        folders: Where each lies.
        sha256: Of each one's description and weights.
        specs: What each is.
        mpp: um per px of the tiles that they learned from, None where not known.
        halo: px around a core that makes its mask exact.
    """

    folders: Mapping[str, str]
    sha256: Mapping[str, str]
    specs: Mapping[str, ModelSpec]
    mpp: float | None
    halo: int


def find_models(store: Store, settings: SegmentSettings) -> ModelFiles:
    """Find the networks that `segment.use` asks for.

    Args:
        store: A finished run, or a folder with `members/NAME` and `fusion`, or with NAME and `fusion`.
        settings: Of the segmentation.

    Returns:
        Where they are, and what they are.

    Raises:
        UsageError: One is not there.
        ApacsError: They are not of one piece: one was trained anew since.
    """
    folders: dict[str, str] = {}
    if settings.use == "fusion":
        folders["fusion"] = _folder(store, ("fusion",))
    members = _spec(store, folders["fusion"]).members if settings.use == "fusion" else settings.members
    folders = {name: _folder(store, (f"members/{name}", name)) for name in members} | folders
    specs = {key: _spec(store, folder) for key, folder in folders.items()}
    mpps = {spec.mpp for spec in specs.values()}
    return ModelFiles(
        folders,
        dict(zip(folders, _hashes(store, folders.values()), strict=True)),
        specs,
        mpps.pop() if len(mpps) == 1 else None,
        exact_halo(tuple(members), specs.get("fusion")),
    )


def _folder(store: Store, candidates: tuple[str, ...]) -> str:
    for folder in candidates:
        if store.version(f"{folder}/{MODEL_JSON}") is not None:
            return folder
    raise UsageError(
        f"--model {store.uri}: no {candidates[0]}/{MODEL_JSON} there: give the --output of a finished run, or a folder "
        "with the folders of its models"
    )


def _spec(store: Store, folder: str) -> ModelSpec:
    return ModelSpec.from_json(store.read(f"{folder}/{MODEL_JSON}"))


def _hashes(store: Store, folders: Iterable[str]) -> Iterator[str]:
    """The hash of the description and the weights of each model."""
    paths = list(folders)
    for folder, weights in zip(paths, read_weights(store, paths), strict=True):
        digest = hashlib.sha256(store.read(f"{folder}/{MODEL_JSON}"))
        digest.update(weights)
        yield digest.hexdigest()
