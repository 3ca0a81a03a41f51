"""The companions of slides: files that a slide needs beside the one that is opened, found by content.

DICOM: the files of its folder with its SeriesInstanceUID. VMS and VMU: the names inside it. MRXS: its own folder.
A slide or an annotation is no other slide's companion. Only `read_heads` reads anything.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_partial

from apacs_ray.data.ignored import hidden_part
from apacs_ray.errors import ApacsError, BadInput, StoreTroubleError
from apacs_ray.storage import Entry, Store, is_bad_path

READERS = 16  # heads that are read at the same time
HEADS = (1 << 16, 1 << 20, 1 << 26)  # bytes of a DICOM file that are read, until they hold its series
LARGEST_INDEX = 1 << 20  # bytes of a VMS or VMU that are read
ANNOTATIONS = ("geojson", "json", "xml")  # suffixes of files that are no slide's companions
SERIES = 0x0020000E  # SeriesInstanceUID
_NAMED = re.compile(
    r"^\s*(?:ImageFile|MapFile|OptimisationFile|MacroImage)[^=]*=\s*(.*?)\s*$", re.MULTILINE | re.IGNORECASE
)


@dataclass(frozen=True)
class Heads:
    """The heads of files, by path: what they say of a slide's companions.

    Attributes:
        series: of DICOM files, their SeriesInstanceUID.
        named: of VMS and VMU, the names of their companions.
        refused: why a file cannot be read.
    """

    series: dict[str, str] = field(default_factory=dict)
    named: dict[str, frozenset[str]] = field(default_factory=dict)
    refused: dict[str, BadInput] = field(default_factory=dict)


def suffix_of(path: str) -> str:
    """Return the part of a file's name after its last dot, in lower case."""
    return path.rpartition("/")[2].rpartition(".")[2].lower()


def read_heads(store: Store, entries: Iterable[Entry]) -> Heads:
    """Read what tells the companions of DICOM, VMS and VMU: the heads of these files, several at a time.

    Args:
        store: where the files lie.
        entries: all files of the listing.

    Returns:
        What the files say; one that cannot be read is in `refused`.

    Raises:
        StoreTroubleError: the store is in trouble.
    """
    wanted = [
        entry
        for entry in entries
        if suffix_of(entry.path) in ("dcm", "vms", "vmu")
        and not hidden_part(entry.path)
        and not is_bad_path(entry.path)
    ]
    heads = Heads()

    def read(entry: Entry) -> str | frozenset[str] | BadInput:
        try:
            return _series(store, entry) if suffix_of(entry.path) == "dcm" else _names(store, entry)
        except BadInput as defect:
            return defect
        except StoreTroubleError:
            raise
        except (ApacsError, OSError) as error:  # gone, or it may not be read
            return BadInput("unreadable", f"{entry.path}: cannot be read ({error}); correct its rights, or remove it")

    with ThreadPoolExecutor(READERS) as readers:
        for entry, answer in zip(wanted, readers.map(read, wanted), strict=True):
            if isinstance(answer, BadInput):
                heads.refused[entry.path] = answer
            elif isinstance(answer, str):
                heads.series[entry.path] = answer
            else:
                heads.named[entry.path] = answer
    return heads


def _series(store: Store, entry: Entry) -> str:
    """Return the SeriesInstanceUID of a DICOM file. Raises BadInput where there is none."""
    reason = "it ends before it"
    with store.open(entry.path) as stream:
        head = b""
        for size in HEADS:
            head += stream.read(min(size, entry.size) - len(head))
            try:
                dataset = read_partial(io.BytesIO(head), stop_when=lambda tag, vr, length: tag > SERIES)
                series = str(dataset.get("SeriesInstanceUID") or "").strip()
            except InvalidDicomError:
                raise BadInput("unsupported_slide", f"{entry.path}: is no DICOM file, whatever its name says") from None
            except Exception as error:  # noqa: BLE001 - a parser on damaged bytes: whatever it raises is the file's defect
                reason, series = f"{type(error).__name__}: {error}", ""
            if series:
                return series
            if len(head) >= entry.size:
                break
    raise BadInput("unreadable", f"{entry.path}: a DICOM file without SeriesInstanceUID ({reason[:200]})")


def _names(store: Store, entry: Entry) -> frozenset[str]:
    """Return the file names in a VMS or VMU, as `_same` compares them."""
    with store.open(entry.path) as stream:
        content = stream.read(min(entry.size, LARGEST_INDEX))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", "replace")
    return frozenset(_same(re.split(r"[\\/]", value)[-1]) for value in _NAMED.findall(text) if value)


def _same(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@dataclass(frozen=True)
class SlideParts:
    """The files of one slide, the one to open first, or why it is none. `aliases` are further names it goes by."""

    files: tuple[Entry, ...]
    aliases: tuple[str, ...] = ()
    defect: BadInput | None = None


def find_parts(slides: Sequence[Entry], others: Sequence[Entry], heads: Heads) -> tuple[list[SlideParts], list[Entry]]:
    """Return the slides of a listing in the order of their paths, and the files that are left.

    What lies in an MRXS's own folder is left: `mrxs_folders`.

    Args:
        slides: files that an engine may open.
        others: the other files of the listing.
        heads: `read_heads` of the listing.

    Returns:
        The slides with their companions, and the files that belong to none.
    """
    names: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for other in others:
        folder, _, name = other.path.rpartition("/")
        if suffix_of(name) not in ANNOTATIONS:
            names[folder, _same(name)].append(other)
    series: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    parts: list[SlideParts] = []
    owned: set[str] = set()
    for entry in slides:
        folder = entry.path.rpartition("/")[0]
        if entry.path in heads.refused:
            parts.append(SlideParts((entry,), defect=heads.refused[entry.path]))
        elif entry.path in heads.series:
            series[folder, heads.series[entry.path]].append(entry)
        else:
            needed = [
                other
                for name in sorted(heads.named.get(entry.path, ()))
                for other in names.get((folder, name), ())
                if other.path not in owned
            ]
            owned |= {other.path for other in needed}
            parts.append(SlideParts((entry, *sorted(needed, key=lambda other: other.path))))
    for (folder, uid), files in series.items():
        aliases = (uid, folder.rpartition("/")[2]) if folder else (uid,)
        parts.append(SlideParts(tuple(files), aliases))
    parts.sort(key=lambda part: part.files[0].path)
    return parts, [other for other in others if other.path not in owned]


def mrxs_folders(entries: Sequence[Entry]) -> dict[str, str]:
    """Return folder -> the .mrxs whose data it holds: the folder of its name, in the same case where several are."""
    mains = [entry.path for entry in entries if suffix_of(entry.path) == "mrxs"]
    if not mains:
        return {}
    folders: dict[str, list[str]] = defaultdict(list)
    for folder in sorted({path for entry in entries for path in _above(entry.path)}):
        parent, _, name = folder.rpartition("/")
        folders[f"{parent}/{_same(name)}"].append(folder)
    main_of: dict[str, str] = {}
    exact = {main.rpartition(".")[0]: main for main in mains}
    for same in folders.values():
        main_of |= {folder: exact[folder] for folder in same if folder in exact}
    for main in mains:
        base = main.rpartition(".")[0]
        parent, _, name = base.rpartition("/")
        free = [folder for folder in folders.get(f"{parent}/{_same(name)}", ()) if folder not in main_of]
        if base not in main_of and free:
            main_of[free[0]] = main
    return main_of


def _above(path: str) -> list[str]:
    """Return the folders that a file lies in, the innermost first."""
    parts = path.split("/")[:-1]
    return ["/".join(parts[:depth]) for depth in range(len(parts), 0, -1)]


def owner_of(path: str, folders: dict[str, str]) -> str | None:
    """Return the .mrxs in whose folder a file lies, by `mrxs_folders`; None when there is none."""
    return next((folders[folder] for folder in _above(path) if folder in folders), None) if folders else None
