"""Pairs of image and mask, found in a listing of files by the names of their folders. Nothing is opened here.

A file's folders, below the data root, name its split (train, val or test) and its role (input or groundtruth)
in any case, together (`APACS23_Train_Input/`) or apart (`train/input/`). Image and mask are joined by split
and stem, and where a split holds a stem several times by their other folders, such as those of patients, too.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from apacs_ray.data.ignored import Ignored, hidden_part
from apacs_ray.data.rejects import BAD_NAME, Reject
from apacs_ray.data.words import SPLITS, Role, Split, distinct, mask_stem, roles_of, splits_of
from apacs_ray.errors import BadInput
from apacs_ray.storage import Entry, is_bad_path

SUFFIXES = ("jpg", "jpeg", "png", "tif", "tiff", "bmp")


@dataclass(frozen=True)
class Pair:
    """An image and its mask. `stem` is the file name without its suffix, in Unicode's NFC."""

    split: Split
    stem: str
    image: Entry
    mask: Entry
    slide_id: str

    @property
    def image_id(self) -> str:
        """The name of this image, unique in a run: its path without the suffix."""
        return self.image.path.rpartition(".")[0]


@dataclass(frozen=True)
class FolderData:
    """The pairs of a listing. Each entry is in exactly one pair, in `rejected` or in `ignored`.

    The unit of rejects is what could have been a pair: all files of one split, stem and place, or one file that
    can belong to no pair. So the units listed are len(pairs) + len(rejects), and `rejected[i]` are the files
    behind `rejects[i]`.
    """

    pairs: tuple[Pair, ...]
    rejects: tuple[Reject, ...]
    rejected: tuple[tuple[Entry, ...], ...]
    left: Ignored  # outside the layout's folders, hidden, and files of the system
    folders: tuple[str, ...]  # that hold images or masks, as 'Train_Input (train input)'
    shared_slides: tuple[str, ...]  # slides that `slide_regex` found in more than one split

    @property
    def ignored(self) -> tuple[Entry, ...]:
        """All files that are not used."""
        return self.left.entries


@dataclass(frozen=True)
class _File:
    split: Split
    role: Role
    stem: str
    place: tuple[str, ...]  # its folders that name neither split nor role
    entry: Entry


@dataclass(frozen=True)
class _Unit:
    """Files that together could be a pair. `apart` are files of the same split and stem in other places."""

    files: Sequence[_File]
    apart: Sequence[_File] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Possible names of its slide, from short to long."""
        split, stem, place = self.files[0].split, self.files[0].stem, "/".join(self.files[0].place)
        within = f"{place}/{stem}" if place else f"{split}/{stem}"
        return stem, f"{split}/{stem}", within, f"{split}/{within}" if place else within


@dataclass(frozen=True)
class _Refused:
    """A unit that is no pair; the culprit is the file that its reject names."""

    culprit: Entry
    entries: tuple[Entry, ...]
    slide_id: str | None
    defect: BadInput

    def row(self, root: str) -> Reject:
        uri = f"{root.rstrip('/')}/{self.culprit.path}" if root else self.culprit.path
        return Reject.of(self.defect, uri, self.slide_id)


def is_folder_layout(entries: Iterable[Entry]) -> bool:
    """Tell whether any file lies in a folder of this layout."""
    return any(not _is_left(entry.path) and _names(entry.path) is not None for entry in entries)


def find_pairs(entries: Iterable[Entry], *, slide_regex: str | None = None, root: str = "") -> FolderData:
    """Join images and masks by split and stem.

    A stem that a split holds several times is joined within each place: the folders that name neither split nor role. A
    mask STEM_mask.png stands for STEM where no mask of that stem lies beside it. Without `slide_regex` each pair is its
    own slide; a stem that occurs in two splits is then two slides, `train/STEM` and `test/STEM`, one in two places
    `PLACE/STEM`.

    Args:
        entries: files of the data.
        slide_regex: searched in the stem; its first group, or without groups the whole match, is the slide id.
        root: URI put before the paths that rejects name.

    Returns:
        Pairs in the order of split, then stem, and what is no pair. Codes: missing_mask missing_image duplicate_stem
        empty_file unknown_suffix ambiguous_folder bad_name.
    """
    placed: list[_File] = []
    hidden: list[Entry] = []
    others: list[Entry] = []
    refused: list[_Refused] = []
    for entry in sorted(entries, key=lambda entry: entry.path):
        try:
            file = _place(entry)
        except BadInput as defect:
            refused.append(_Refused(entry, (entry,), None, defect))
            continue
        if file is not None:
            placed.append(file)
        elif hidden_part(entry.path) is not None:
            hidden.append(entry)
        else:
            others.append(entry)
    units = _units(_without_mask_words(placed))
    pairs: list[Pair] = []
    for unit, slide in zip(units, _slides(units, slide_regex), strict=True):
        joined = _joined(unit, slide, slide_regex)
        if isinstance(joined, Pair):
            pairs.append(joined)
        else:
            refused.append(joined)
    return FolderData(
        pairs=tuple(pairs),
        rejects=tuple(unit.row(root) for unit in refused),
        rejected=tuple(unit.entries for unit in refused),
        left=Ignored(hidden=tuple(hidden), others=tuple(others)),
        folders=tuple(sorted({f"{f.entry.path.rpartition('/')[0]} ({f.split} {f.role})" for f in placed})),
        shared_slides=_shared(pairs),
    )


def _is_left(path: str) -> bool:
    """Tell whether a file is hidden, the system's, a folder marker of an object store, or leads out of the folder."""
    *folders, name = path.split("/")
    return hidden_part(path) is not None or not name or any(part in (".", "..") for part in (*folders, name))


def _names(path: str) -> tuple[frozenset[Split], frozenset[Role]] | None:
    """Return the splits and roles that a file's folders name (the innermost that names any counts); None outside."""
    splits: frozenset[Split] = frozenset()
    roles: frozenset[Role] = frozenset()
    for folder in path.split("/")[:-1]:
        splits = splits_of(folder) or splits
        roles = roles_of(folder) or roles
    return (splits, roles) if splits and roles else None


def _place(entry: Entry) -> _File | None:
    """Return where a file belongs; None when it lies outside the layout. Raises BadInput where that is not clear."""
    named = None if _is_left(entry.path) else _names(entry.path)
    if named is None:
        return None
    for names in named:
        if len(names) > 1:
            raise BadInput("ambiguous_folder", f"its folder names both {' and '.join(sorted(names))}")
    (split,), (role,) = named
    if is_bad_path(entry.path):
        raise BadInput("bad_name", BAD_NAME)
    *folders, name = unicodedata.normalize("NFC", entry.path).split("/")
    stem, _, suffix = name.rpartition(".")
    if not stem or suffix.lower() not in SUFFIXES:
        raise BadInput("unknown_suffix", f"images and masks end in .{', .'.join(SUFFIXES)}")
    place = tuple(folder for folder in folders if not splits_of(folder) and not roles_of(folder))
    return _File(split, role, stem, place, entry)


def _without_mask_words(files: Sequence[_File]) -> list[_File]:
    """Rename STEM_mask.png to STEM, unless an image is called so or STEM has a mask beside it."""
    images = {(file.split, file.stem) for file in files if file.role == "input"}
    masks = {(file.split, file.stem, file.place) for file in files if file.role == "groundtruth"}
    renamed = []
    for file in files:
        if file.role == "groundtruth" and (file.split, file.stem) not in images:
            plain = mask_stem(file.stem)
            if plain and (file.split, plain[0]) in images and (file.split, plain[0], file.place) not in masks:
                file = replace(file, stem=plain[0])
        renamed.append(file)
    return renamed


def _units(files: Iterable[_File]) -> list[_Unit]:
    """Group files that could be a pair: those of one split and stem, or of one place where a role has several."""
    named: dict[tuple[int, str], list[_File]] = defaultdict(list)
    for file in files:
        named[SPLITS.index(file.split), file.stem].append(file)
    units: list[_Unit] = []
    for _, same in sorted(named.items()):
        if max(Counter(file.role for file in same).values()) == 1:
            units.append(_Unit(same))
            continue
        places: dict[tuple[str, ...], list[_File]] = defaultdict(list)
        for file in same:
            places[file.place].append(file)
        units += [
            _Unit(files, [file for file in same if file.place != place]) for place, files in sorted(places.items())
        ]
    return units


def _slides(units: Sequence[_Unit], slide_regex: str | None) -> list[str | None]:
    """Return the slide id of each unit; None where the expression finds none."""
    if slide_regex is None:
        return list(distinct([unit.names for unit in units]))
    regex = re.compile(slide_regex)
    matches = [regex.search(unit.files[0].stem) for unit in units]
    return [(match and match.group(min(regex.groups, 1))) or None for match in matches]


def _joined(unit: _Unit, slide_id: str | None, slide_regex: str | None) -> Pair | _Refused:
    """Join the files of a unit to a pair, or return why they are none."""
    files = unit.files
    entries = tuple(file.entry for file in files)
    split, stem = files[0].split, files[0].stem
    images = [file.entry for file in files if file.role == "input"]
    masks = [file.entry for file in files if file.role == "groundtruth"]
    empty = next((entry for entry in entries if entry.size == 0), None)
    names = ", ".join(entry.path for entry in entries)
    culprit = entries[0]
    if len(images) > 1 or len(masks) > 1:
        defect = BadInput("duplicate_stem", f"several files of one stem, keep one image and one mask: {names}")
    elif empty is not None:
        culprit = empty
        defect = BadInput("empty_file", f"{empty.path} has no bytes, so there is no pair of: {names}")
    elif not masks:
        defect = BadInput("missing_mask", f"no groundtruth file of {split} has the stem {stem!r}{_elsewhere(unit)}")
    elif not images:
        defect = BadInput("missing_image", f"no input file of {split} has the stem {stem!r}{_elsewhere(unit)}")
    elif slide_id is None:
        defect = BadInput("bad_name", f"data.slide_regex ({slide_regex}) finds no slide id in {stem!r}")
    else:
        return Pair(split, stem, images[0], masks[0], slide_id)
    return _Refused(culprit, entries, slide_id, defect)


def _elsewhere(unit: _Unit) -> str:
    """Return what to say of files of the other role in other places."""
    others = [file.entry.path for file in unit.apart if file.role != unit.files[0].role]
    if not others:
        return ""
    return f" in the same sub-folders, and the split holds it several times; there is {', '.join(others[:3])}"


def _shared(pairs: Iterable[Pair]) -> tuple[str, ...]:
    splits: dict[str, set[Split]] = defaultdict(set)
    for pair in pairs:
        splits[pair.slide_id].add(pair.split)
    return tuple(sorted(slide for slide, named in splits.items() if len(named) > 1))
