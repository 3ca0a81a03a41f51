"""Files of a listing that are not used: which ones are hidden or the system's, and how all of them are reported."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from apacs_ray.storage import Entry

MAX_NAMES, MAX_PLACES = 5, 10  # names that are listed of each kind; of hidden places
MAX_LENGTH = 80  # characters of a name in a sentence
# what file managers, NAS boxes, snapshots and archives leave behind, beside all that begins with a dot
SYSTEM = {
    "#recycle", "#snapshot", "$recycle.bin", "@eadir", "@recently-snapshot", "@recycle", "@tmp", "__macosx",
    "__pycache__", "desktop.ini", "ehthumbs.db", "ehthumbs_vista.db", "icon\r", "lost+found",
    "network trash folder", "recycled", "recycler", "system volume information", "temporary items", "thumbs.db",
    "~snapshot",
}  # fmt: skip
_LOCK = re.compile(r"~\$.")  # lock files of office programs


def hidden_part(path: str) -> str | None:
    """Return the first part of a path that is hidden or the system's, None when there is none."""
    for part in path.split("/"):
        if part not in (".", "..") and (part.startswith(".") or part.lower() in SYSTEM or _LOCK.match(part)):
            return part
    return None


@dataclass(frozen=True)
class Ignored:
    """Listed files that are not used, by kind. Each is in one of them, in the order of the paths."""

    hidden: tuple[Entry, ...] = ()
    previews: tuple[Entry, ...] = ()  # pictures named like a slide that something else annotates
    strays: tuple[Entry, ...] = ()  # annotations that belong to no slide
    others: tuple[Entry, ...] = ()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All of them, in the order of their paths."""
        files = (*self.hidden, *self.previews, *self.strays, *self.others)
        return tuple(sorted(files, key=lambda entry: entry.path))

    def counts(self) -> dict[str, int]:
        """Return how many there are of each kind."""
        kinds = {"hidden": self.hidden, "previews": self.previews, "strays": self.strays, "others": self.others}
        return {kind: len(entries) for kind, entries in kinds.items() if entries}

    def describe(self) -> str | None:
        """Return a sentence about them, with counts and the first few names; None when there are none."""
        # name one file of each hidden place, so that each trash and snapshot is listed
        hidden: dict[str | None, Entry] = {}
        for entry in self.hidden:
            hidden.setdefault(hidden_part(entry.path), entry)
        kinds = (
            (self.hidden, "hidden or system file", names(hidden.values(), MAX_PLACES)),
            (self.previews, "preview of a slide", names(self.previews)),
            (self.strays, "annotation of no slide", names(self.strays)),
            (self.others, "file of another kind", names(self.others)),
        )
        parts = [f"{len(entries)} x {what} ({examples})" for entries, what, examples in kinds if entries]
        return f"ignored {', '.join(parts)}" if parts else None


def names(entries: Iterable[Entry], most: int = MAX_NAMES) -> str:
    """Return the paths of the first few of some files, for a sentence; long ones lose their beginning."""
    paths = [entry.path for entry in entries]
    shortened = [path if len(path) <= MAX_LENGTH else f"...{path[3 - MAX_LENGTH :]}" for path in paths[:most]]
    return ", ".join([*shortened, "..."] if len(paths) > most else shortened)
