"""Words in the names of folders and files: which split and which role they name. One rule for both layouts.

A word is a run of letters; camel case and digits end one (`BatchTest`, `APACS23_Train2`). A word names a split when it
is one (train, training, val, valid, validation, test, tests, testing), alone or written together with others that are
known here (`testset`, `traininput`): Valencia, testis, latest and validated name none.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, cast

Split = Literal["train", "val", "test"]
Role = Literal["input", "groundtruth"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

_LETTERS = re.compile(r"[^\W\d_]+")
_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")  # TrainInput -> Train Input
_ACRONYM = re.compile(r"(?<=[A-Z])(?=[A-Z][a-z])")  # HETest -> HE Test
_KNOWN = re.compile(
    r"(?:train(?:ing)?|val(?:id(?:ation)?)?|test(?:s|ing)?|inputs?|ground|truths?|sets?|data|images?|imgs?|masks?|"
    r"slides?|tiles?|files?|labels?|annotations?|wsis?|folds?|splits?)+"
)
_SPLIT = re.compile("train|val|test")
_ROLE = re.compile(r"input|ground[ _-]*truth")
_MASK = r"masks?|ground[ _-]*truths?|annotations?|labels?|labell?ed"
_MASK_END = re.compile(rf"(?s)(?P<stem>.*[^_\-. ])[_\-. ]+(?P<word>{_MASK})\s*", re.IGNORECASE)
_MASK_FOLDER = re.compile(r"(?:masks?|annotations?|ground[ _-]*truths?|(?<![^\W\d_])labels)(?![^\W\d_])", re.IGNORECASE)


@lru_cache(maxsize=1 << 14)
def splits_of(folder: str) -> frozenset[Split]:
    """Return the splits that the name of a folder names."""
    camel = _CAMEL.sub(" ", folder)
    words = {word.lower() for text in (camel, _ACRONYM.sub(" ", camel)) for word in _LETTERS.findall(text)}
    return frozenset(cast(Split, name) for word in words if _KNOWN.fullmatch(word) for name in _SPLIT.findall(word))


@lru_cache(maxsize=1 << 14)
def roles_of(folder: str) -> frozenset[Role]:
    """Return the roles that the name of a folder names."""
    words = _CAMEL.sub(" ", folder).lower()
    return frozenset("input" if role == "input" else "groundtruth" for role in _ROLE.findall(words))


def innermost_splits(folders: Sequence[str]) -> frozenset[Split]:
    """Return the splits that the innermost of a path's folders that names any names; empty when none does."""
    return next((found for folder in reversed(folders) if (found := splits_of(folder))), frozenset())


def mask_stem(stem: str) -> tuple[str, str] | None:
    """Return `NAME_mask` as (NAME, mask): the name without the words that say that it is a mask, and their first.

    Args:
        stem: a file name without its suffix.

    Returns:
        The name, and of the words the one nearest to it, in lower case; None when it says nothing of the kind.
    """
    word = None
    while match := _MASK_END.fullmatch(stem):
        stem, word = match["stem"], match["word"]
    return None if word is None else (stem, word.lower())


@lru_cache(maxsize=1 << 14)
def is_mask_folder(folder: str) -> bool:
    """Tell whether the name of a folder says that masks or annotations are in it."""
    return _MASK_FOLDER.search(_CAMEL.sub(" ", folder)) is not None


def distinct(choices: Sequence[Sequence[str]]) -> list[str]:
    """Choose for each unit the first of its names that is no other's.

    Args:
        choices: of each unit its names from short to long; the last is its own.

    Returns:
        A name for each unit, each once.
    """
    chosen: dict[int, str] = {}
    taken: set[str] = set()
    for level in range(max(map(len, choices), default=0)):
        counts: dict[str, list[int]] = {}
        for number, unit in enumerate(choices):
            if number not in chosen:
                counts.setdefault(unit[min(level, len(unit) - 1)], []).append(number)
        for name, numbers in counts.items():
            if len(numbers) == 1 and name not in taken:
                chosen[numbers[0]] = name
                taken.add(name)
    for number, unit in enumerate(choices):
        if number not in chosen:
            name = unit[-1]
            while name in taken:
                name = f"./{name}"
            chosen[number] = name
            taken.add(name)
    return [chosen[number] for number in range(len(choices))]
