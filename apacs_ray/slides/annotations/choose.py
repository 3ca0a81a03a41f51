"""The choice of a slide's annotation among the files that are named after the slide, or why none is chosen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from apacs_ray.data.rejects import BAD_NAME
from apacs_ray.errors import BadInput, few
from apacs_ray.slides.annotations.names import JPEG, AnnotationKind, Fov
from apacs_ray.slides.companions import suffix_of
from apacs_ray.storage import Entry, is_bad_path


@dataclass(frozen=True)
class Candidate:
    """A file that may annotate a slide. `doubtful`: a picture beside the slide whose name does not say mask."""

    entry: Entry
    where: Literal["data", "masks"]
    kind: AnnotationKind
    fov: Fov | None
    doubtful: bool


@dataclass
class Chosen:
    """The files that are used (one, or FOVs), those that are refused and why, and pictures that are previews only."""

    used: tuple[Candidate, ...] = ()
    refused: list[tuple[BadInput, tuple[Candidate, ...]]] = field(default_factory=list)
    previews: list[Candidate] = field(default_factory=list)


def choose_annotation(candidates: Sequence[Candidate]) -> Chosen:
    """Choose the annotation of a slide among the files of its name.

    A picture whose name does not say that it is a mask yields to any other annotation, and a JPEG is never a mask. Of
    several annotations none is used, because nothing says which is right.

    Args:
        candidates: files that may annotate one slide.

    Returns:
        What is used, what is refused, and pictures that are previews. Codes: bad_name, bad_annotation,
        duplicate_annotation.
    """
    chosen = Chosen()
    good: list[Candidate] = []
    for one in candidates:
        if is_bad_path(one.entry.path):
            chosen.refused.append((BadInput("bad_name", BAD_NAME), (one,)))
        elif one.fov and one.fov.downsample != 1:
            reason = (
                f"{one.entry.path}: its name says that a pixel of it is {one.fov.downsample:g} of the slide's; export "
                "tiles of the full resolution (d=1)"
            )
            chosen.refused.append((BadInput("bad_annotation", reason), (one,)))
        else:
            good.append(one)
    pictures = [one for one in good if one.doubtful and suffix_of(one.entry.path) in JPEG]
    chosen.previews += pictures
    good = [one for one in good if one not in pictures]
    fovs = _fovs([one for one in good if one.kind == "fovs"], chosen)
    whole = [one for one in good if one.kind != "fovs"]
    meant: list[tuple[Candidate, ...]] = [(one,) for one in whole if not one.doubtful]
    meant += [unit for where in ("data", "masks") if (unit := tuple(one for one in fovs if one.where == where))]
    doubtful = [one for one in whole if one.doubtful]
    if meant:
        chosen.previews += doubtful
    else:
        meant = [(one,) for one in doubtful]
    if len(meant) == 1:
        chosen.used = meant[0]
    elif meant:
        chosen.refused.append(_duplicates([one for unit in meant for one in unit]))
    return chosen


def _fovs(fovs: Sequence[Candidate], chosen: Chosen) -> list[Candidate]:
    """Choose a mask of each field of view: a picture yields to the mask of its place; of several none is taken."""
    places: dict[tuple[int, int, bool], list[Candidate]] = defaultdict(list)
    for one in fovs:
        if one.fov:
            places[one.fov.x, one.fov.y, one.fov.from_bounds].append(one)
    chosen_masks: list[Candidate] = []
    for same in places.values():
        masks = [one for one in same if not one.doubtful] or same
        chosen.previews += [one for one in same if one not in masks]
        if len({one.where for one in masks}) < len(masks):
            chosen.refused.append(_duplicates(masks))
        else:
            chosen_masks += masks
    return chosen_masks


def _duplicates(several: Sequence[Candidate]) -> tuple[BadInput, tuple[Candidate, ...]]:
    names = few([f"{one.entry.path}{' (data.masks)' * (one.where == 'masks')}" for one in several], 4)
    return BadInput("duplicate_annotation", f"several annotations of one slide, keep one: {names}"), tuple(several)
