"""The data set's folder layout: from a listing of files to pairs of image and mask. Nothing is opened here.

A file's folders, below the data root, name its split (train, val or test) and its role (input or groundtruth)
in any case, together (`APACS23_Train_Input/`) or apart (`train/input/`). Image and mask are joined by split
and stem.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from apacs_ray.clean import as_text
from apacs_ray.errors import BadInput
from apacs_ray.storage import Entry, is_bad_path

__all__ = ["SPLITS", "Entry", "FolderData", "Pair", "Reject", "Split", "find_pairs", "is_folder_layout"]

Split = Literal["train", "val", "test"]
Role = Literal["input", "groundtruth"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SUFFIXES = ("jpg", "jpeg", "png", "tif", "tiff", "bmp")
BAD_NAME = "its path has empty parts, '..' or characters that are no UTF-8; rename it"
STAGE = "ingest"  # that refuses inputs
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db"}

_WORD_START = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")  # TrainInput -> Train Input
_SPLIT = re.compile(r"(?:(?<![a-z])|(?<=input)|(?<=truth))(train|val|test)")  # not in: latest, interval, evaluation
_ROLE = re.compile(r"input|ground[ _-]*truth")


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
class Reject:
    """A row of rejects/: one unit with a permanent defect. `code` is a stable word, `reason` a sentence."""

    uri: str
    slide_id: str | None
    x: int | None
    y: int | None
    stage: str
    code: str
    reason: str

    @classmethod
    def of(cls, defect: BadInput, uri: str, slide_id: str | None, x: int | None = None, y: int | None = None) -> Reject:
        """The row for a defect that ingest met."""
        slide_id = None if slide_id is None else as_text(slide_id)
        return cls(as_text(uri), slide_id, x, y, STAGE, defect.code, as_text(defect.reason))


@dataclass(frozen=True)
class FolderData:
    """What a listing holds. Each entry is in exactly one pair, in `rejected` or in `ignored`.

    The unit of rejects is what could have been a pair: all files of one split and stem, or one file that can
    belong to no pair. So the units listed are len(pairs) + len(rejects), and `rejected[i]` are the files
    behind `rejects[i]`.
    """

    pairs: tuple[Pair, ...]
    rejects: tuple[Reject, ...]
    rejected: tuple[tuple[Entry, ...], ...]
    ignored: tuple[Entry, ...]  # outside the layout's folders, hidden, and files of the system
    folders: tuple[str, ...]  # that hold images or masks, as 'Train_Input (train input)'
    shared_slides: tuple[str, ...]  # slides that `slide_regex` found in more than one split


@dataclass(frozen=True)
class _File:
    split: Split
    role: Role
    stem: str
    entry: Entry


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
    """Whether any file lies in a folder of this layout."""
    return any(not _is_system(entry.path) and _names(entry.path) is not None for entry in entries)


def find_pairs(entries: Iterable[Entry], *, slide_regex: str | None = None, root: str = "") -> FolderData:
    """Join images and masks by split and stem, in the order of split, then stem.

    `slide_regex` is searched in the stem: its first group, or without groups the whole match, is the slide
    id. Without it each stem is its own slide; a stem that occurs in two splits is then two slides,
    `train/STEM` and `test/STEM`. `root` is the URI put before the paths that rejects name. Codes:
    missing_mask missing_image duplicate_stem empty_file unknown_suffix ambiguous_folder bad_name.
    """
    units: dict[tuple[int, str], list[_File]] = defaultdict(list)
    ignored: list[Entry] = []
    refused: list[_Refused] = []
    folders: set[str] = set()
    for entry in sorted(entries, key=lambda entry: entry.path):
        try:
            file = _place(entry)
        except BadInput as defect:
            refused.append(_Refused(entry, (entry,), None, defect))
            continue
        if file is None:
            ignored.append(entry)
            continue
        folders.add(f"{entry.path.rpartition('/')[0]} ({file.split} {file.role})")
        units[SPLITS.index(file.split), file.stem].append(file)
    slides = _slides(units, slide_regex)
    pairs: list[Pair] = []
    for key, files in sorted(units.items()):
        joined = _joined(files, slides[key], slide_regex)
        if isinstance(joined, Pair):
            pairs.append(joined)
        else:
            refused.append(joined)
    return FolderData(
        pairs=tuple(pairs),
        rejects=tuple(unit.row(root) for unit in refused),
        rejected=tuple(unit.entries for unit in refused),
        ignored=tuple(ignored),
        folders=tuple(sorted(folders)),
        shared_slides=_shared(pairs),
    )


def _is_system(path: str) -> bool:
    """Folder markers of object stores, hidden files and folders, and what file managers leave behind."""
    *folders, name = path.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in (*folders, name))
    return hidden or not name or name.lower() in SYSTEM_FILES


def _names(path: str) -> tuple[set[str], set[str]] | None:
    """The splits and roles that a file's folders name (the innermost that names any counts); None outside."""
    splits: set[str] = set()
    roles: set[str] = set()
    for folder in path.split("/")[:-1]:
        words = _WORD_START.sub(" ", folder).lower()
        splits = set(_SPLIT.findall(words)) or splits
        roles = {"input" if role == "input" else "groundtruth" for role in _ROLE.findall(words)} or roles
    return (splits, roles) if splits and roles else None


def _place(entry: Entry) -> _File | None:
    """Where a file belongs; None when it lies outside the layout. Raises BadInput where none can be told."""
    names = None if _is_system(entry.path) else _names(entry.path)
    if names is None:
        return None
    for found in names:
        if len(found) > 1:
            raise BadInput("ambiguous_folder", f"its folder names both {' and '.join(sorted(found))}")
    (split,), (role,) = names
    if is_bad_path(entry.path):
        raise BadInput("bad_name", BAD_NAME)
    stem, _, suffix = entry.path.rpartition("/")[2].rpartition(".")
    if not stem or suffix.lower() not in SUFFIXES:
        raise BadInput("unknown_suffix", f"images and masks end in .{', .'.join(SUFFIXES)}")
    return _File(cast(Split, split), cast(Role, role), unicodedata.normalize("NFC", stem), entry)


def _slides(units: Iterable[tuple[int, str]], slide_regex: str | None) -> dict[tuple[int, str], str | None]:
    """The slide id of each unit; None where the expression finds none."""
    if slide_regex is not None:
        regex = re.compile(slide_regex)
        matches = {key: regex.search(key[1]) for key in units}
        return {key: (match and match.group(min(regex.groups, 1))) or None for key, match in matches.items()}
    splits: dict[str, list[int]] = defaultdict(list)
    for number, stem in units:
        splits[stem].append(number)
    return {
        (number, stem): stem if len(numbers) == 1 else f"{SPLITS[number]}/{stem}"
        for stem, numbers in splits.items()
        for number in numbers
    }


def _joined(files: Sequence[_File], slide_id: str | None, slide_regex: str | None) -> Pair | _Refused:
    """All files of one stem in one split as a pair, or why they are none."""
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
        defect = BadInput("missing_mask", f"no groundtruth file of {split} has the stem {stem!r}")
    elif not images:
        defect = BadInput("missing_image", f"no input file of {split} has the stem {stem!r}")
    elif slide_id is None:
        defect = BadInput("bad_name", f"data.slide_regex ({slide_regex}) finds no slide id in {stem!r}")
    else:
        return Pair(split, stem, images[0], masks[0], slide_id)
    return _Refused(culprit, entries, slide_id, defect)


def _shared(pairs: Iterable[Pair]) -> tuple[str, ...]:
    splits: dict[str, set[Split]] = defaultdict(set)
    for pair in pairs:
        splits[pair.slide_id].add(pair.split)
    return tuple(sorted(slide for slide, found in splits.items() if len(found) > 1))
