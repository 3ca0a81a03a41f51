"""From a listing of files to whole slides with their companions and annotations. Nothing is opened here."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, cast

from apacs_ray.data.folder import BAD_NAME, Reject, Split
from apacs_ray.errors import BadInput
from apacs_ray.storage import Entry, is_bad_path

AnnotationKind = Literal["geojson", "asap", "image", "fovs"]

PLAIN = {"tif", "tiff"}  # slides, but plain images and masks as well
SUFFIXES = {"mrxs", "svs", "ndpi", "scn", "vms", "vmu", "bif", "svslide", "dcm"} | PLAIN
KINDS: dict[str, AnnotationKind] = {"geojson": "geojson", "json": "geojson", "xml": "asap"}
MASKS = {"png", "tif", "tiff", "bmp"}
_MASK_NAME = re.compile(r"[_\- .](mask|masks|groundtruth|annotation)$", re.IGNORECASE)
_MASK_FOLDER = re.compile(r"mask|annotation|ground[ _-]*truth", re.IGNORECASE)
_FOV = re.compile(r"^(?:(?P<stem>.*)[_\-])?x?(?P<x>\d+)[_\-]y?(?P<y>\d+)$", re.IGNORECASE)
_SPLIT = re.compile(r"(?<![a-z])(train|val|test)", re.IGNORECASE)


@dataclass(frozen=True)
class SlideFiles:
    """A slide: its own files (the one to open first), and what annotates it, in one of the known ways."""

    slide_id: str
    stem: str
    split: Split | None
    files: tuple[Entry, ...]
    kind: AnnotationKind | None = None
    annotation: tuple[Entry, ...] = ()

    @property
    def path(self) -> str:
        """The file that an engine opens."""
        return self.files[0].path

    @property
    def image_id(self) -> str:
        """The name of this slide in tile ids, unique in a run."""
        return self.path.rpartition(".")[0]

    @property
    def version(self) -> str:
        """Changes when any of its files does."""
        return "+".join(entry.version for entry in (*self.files, *self.annotation))


@dataclass(frozen=True)
class SlideData:
    """What a listing holds; `ignored` belongs to no slide."""

    slides: tuple[SlideFiles, ...]
    rejects: tuple[Reject, ...]
    ignored: tuple[Entry, ...]


def is_slide(path: str) -> bool:
    """Whether a file may be a slide, or (tif) an image of one."""
    folder, _, name = path.rpartition("/")
    stem, _, suffix = name.rpartition(".")
    if suffix.lower() not in SUFFIXES or not stem or name.startswith("."):
        return False
    return suffix.lower() not in PLAIN or not (_MASK_NAME.search(stem) or _MASK_FOLDER.search(folder))


def find_slides(
    entries: Iterable[Entry], masks: Iterable[Entry] = (), *, slide_regex: str | None = None, root: str = ""
) -> SlideData:
    """Slides in the order of their paths. `masks` are the files below `data.masks`: annotations only.

    The companions of NAME.mrxs are all files in NAME/; those of VMS and DICOM are the files of their folder. The
    annotation of a slide STEM lies beside it or anywhere below `masks`: STEM.geojson, STEM.xml (ASAP), a mask image
    STEM.png or STEM_mask.tif, or masks of single FOVs, STEM_X_Y.png or STEM/X_Y.png (level-0 px).
    """
    listed = sorted(entries, key=lambda entry: entry.path)
    companions = _companions(listed)
    owned = {entry.path for files in companions.values() for entry in files[1:]}
    stems: dict[str, list[tuple[Entry, ...]]] = defaultdict(list)
    for files in companions.values():
        if files[0].path not in owned:
            stems[_stem(files[0].path)].append(files)
    main = {files[0].path for same in stems.values() for files in same}
    free = [entry for entry in listed if entry.path not in owned | main]
    annotations = _annotations(free, masks, set(stems))
    slides: list[SlideFiles] = []
    rejects: list[Reject] = []
    used: set[str] = set()
    for stem, same in sorted(stems.items()):
        for files in same:
            slide_id = stem if len(same) == 1 else files[0].path.rpartition(".")[0]
            slide = SlideFiles(slide_id, stem, _split_of(files[0].path), files)
            try:
                slide = _named(_annotated(slide, annotations, alone=len(same) == 1), slide_regex)
                if any(is_bad_path(entry.path) for entry in (*slide.files, *slide.annotation)):
                    raise BadInput("bad_name", BAD_NAME)
                slides.append(slide)
            except BadInput as defect:
                rejects.append(Reject.of(defect, f"{root.rstrip('/')}/{slide.path}", slide.slide_id))
            used |= {entry.path for entry in slide.annotation}
    ignored = [entry for entry in listed if entry.path not in owned | main | used]
    return SlideData(tuple(sorted(slides, key=lambda slide: slide.path)), tuple(rejects), tuple(ignored))


def _stem(path: str) -> str:
    return unicodedata.normalize("NFC", path.rpartition("/")[2].rpartition(".")[0])


def _split_of(path: str) -> Split | None:
    """The split that the innermost folder names, if any does."""
    for folder in reversed(path.split("/")[:-1]):
        found = _SPLIT.findall(folder)
        if found:
            return cast(Split, found[0].lower())
    return None


def _companions(listed: list[Entry]) -> dict[str, tuple[Entry, ...]]:
    """Main file -> it and the files that it needs."""
    folders: dict[str, list[Entry]] = defaultdict(list)
    for entry in listed:
        parts = entry.path.split("/")
        for depth in range(1, len(parts)):
            folders["/".join(parts[:depth])].append(entry)
    found: dict[str, tuple[Entry, ...]] = {}
    for entry in listed:
        if not is_slide(entry.path):
            continue
        base, _, suffix = entry.path.rpartition(".")
        if suffix.lower() == "mrxs":
            others = [other for other in folders.get(base, []) if other.path != entry.path]
        elif suffix.lower() in ("vms", "vmu", "dcm"):
            folder = entry.path.rpartition("/")[0]
            others = [other for other in folders.get(folder, []) if other.path.rpartition("/")[0] == folder]
            first = min((other.path for other in others if other.path.endswith(f".{suffix}")), default=entry.path)
            if suffix.lower() == "dcm" and entry.path != first:
                continue  # one slide of many files: its first stands for all
        else:
            others = []
        found[entry.path] = (entry, *(other for other in others if other.path != entry.path))
    return found


def _annotations(
    beside: Iterable[Entry], masks: Iterable[Entry], stems: set[str]
) -> dict[str, dict[AnnotationKind, list[Entry]]]:
    """Slide stem -> what annotates it, by kind."""
    found: dict[str, dict[AnnotationKind, list[Entry]]] = defaultdict(lambda: defaultdict(list))
    for entry in sorted({**{e.path: e for e in beside}, **{e.path: e for e in masks}}.values(), key=lambda e: e.path):
        stem, suffix = _stem(entry.path), entry.path.rpartition(".")[2].lower()
        folder = unicodedata.normalize("NFC", entry.path.rpartition("/")[0].rpartition("/")[2])
        if suffix in KINDS and stem in stems:
            found[stem][KINDS[suffix]].append(entry)
        elif suffix in MASKS:
            plain = _MASK_NAME.sub("", stem)
            fov = _FOV.match(stem)
            if plain in stems:
                found[plain]["image"].append(entry)
            elif fov and (fov["stem"] or folder) in stems:
                found[fov["stem"] or folder]["fovs"].append(entry)
    return found


def _annotated(
    slide: SlideFiles, annotations: dict[str, dict[AnnotationKind, list[Entry]]], *, alone: bool
) -> SlideFiles:
    kinds = annotations.get(slide.stem, {})
    if not kinds:
        return slide
    names = ", ".join(entry.path for entries in kinds.values() for entry in entries[:2])
    if not alone:
        raise BadInput("duplicate_stem", f"several slides are called {slide.stem!r}, whose annotation is {names}?")
    (kind, entries), *more = kinds.items()
    if more or (kind != "fovs" and len(entries) > 1):
        raise BadInput("duplicate_annotation", f"several annotations, keep one: {names}")
    return replace(slide, kind=kind, annotation=tuple(entries))


def _named(slide: SlideFiles, slide_regex: str | None) -> SlideFiles:
    if slide_regex is None:
        return slide
    match = re.search(slide_regex, slide.stem)
    if match is None:
        raise BadInput("bad_name", f"data.slide_regex ({slide_regex}) finds no slide id in {slide.stem!r}")
    return replace(slide, slide_id=match.group(min(match.re.groups, 1)))


def fov_origin(entry: Entry) -> tuple[int, int]:
    """Level-0 (x, y) that the name of an FOV's mask gives."""
    match = _FOV.match(_stem(entry.path))
    if match is None:
        raise ValueError(entry.path)
    return int(match["x"]), int(match["y"])
