"""The weights that a member's training starts from, where the settings ask for other than random ones."""

from __future__ import annotations

from apacs_ray.config.settings import MemberName, MembersSettings
from apacs_ray.models.fcn import build_member
from apacs_ray.models.start import (
    IMAGENET_FILES,
    LARGEST,
    RELEASED_FILES,
    download_imagenet,
    read_checkpoint,
    start_from_imagenet,
    start_from_released,
)
from apacs_ray.models.weights import weights_bytes
from apacs_ray.storage import Store, open_store


def start_weights(members: MembersSettings, name: MemberName) -> bytes | None:
    """Safetensors of a whole member; None when it starts at random. Raises ApacsError for a file that does not fit."""
    if members.init == "random":
        return None
    network = build_member(name, width=members.width, dropout=members.dropout)
    found = _file(members, name)
    state = (
        download_imagenet(name) if found is None else read_checkpoint(found[0].read_small(found[1], LARGEST), found[1])
    )
    if members.init == "imagenet":
        start_from_imagenet(network, name, state)
    else:
        start_from_released(network, name, state)
    return weights_bytes(network)


def start_version(members: MembersSettings, name: MemberName) -> str | None:
    """Changes when the file behind the start does."""
    found = _file(members, name)
    return None if found is None else found[0].version(found[1])


def _file(members: MembersSettings, name: MemberName) -> tuple[Store, str] | None:
    if members.init == "random" or members.checkpoint is None:
        return None
    files = IMAGENET_FILES if members.init == "imagenet" else RELEASED_FILES
    return open_store(members.checkpoint), files[name]
