"""From a listing of files to whole slides with their companions and annotations. Nothing is opened here.

What has to be read for it, the heads of DICOM, VMS and VMU, `companions.read_heads` reads before.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from apacs_ray.data.folders import BAD_NAME, Reject
from apacs_ray.data.ignored import Ignored, hidden_part
from apacs_ray.data.words import Split, distinct, innermost_splits
from apacs_ray.errors import BadInput
from apacs_ray.slides.annotations.choose import Candidate, choose_annotation
from apacs_ray.slides.annotations.names import (
    AnnotationKind,
    AnnotationName,
    Reading,
    SlideNames,
    annotation_name,
    fov_of,
    stem_of,
)
from apacs_ray.slides.companions import Heads, SlideParts, find_parts, mrxs_folders, owner_of, suffix_of
from apacs_ray.storage import Entry, is_bad_path

Where = Literal["data", "masks"]

PLAIN = {"tif", "tiff"}  # slides, but plain images and masks as well
SUFFIXES = {"mrxs", "svs", "ndpi", "scn", "vms", "vmu", "bif", "svslide", "dcm"} | PLAIN
NAMED_BY_ALL = {"dcm"}  # any file of the slide gives it a name, not just the one that is opened


@dataclass(frozen=True)
class SlideFiles:
    """A slide: its own files (the one to open first), and what annotates it, in one of the known ways."""

    slide_id: str
    stem: str
    split: Split | None
    files: tuple[Entry, ...]
    image_id: str  # the name of this slide in tile ids, unique in a run
    kind: AnnotationKind | None = None
    annotation: tuple[Entry, ...] = ()
    annotation_in: Where = "data"  # which store holds the annotation
    doubtful: bool = False  # a picture beside the slide, of the same name: a mask only if it looks like one

    @property
    def path(self) -> str:
        """The file that an engine opens."""
        return self.files[0].path

    @property
    def version(self) -> str:
        """Changes when any of its files does."""
        return "+".join(entry.version for entry in (*self.files, *self.annotation))


@dataclass(frozen=True)
class SlideData:
    """What a listing holds. Each file is in one slide (its own files, its annotation), in `rejected` or in `left`.

    `rejected[i]` are the files behind `rejects[i]`: first the slides that are refused, then annotations, whose slides
    stay without.
    """

    slides: tuple[SlideFiles, ...]
    rejects: tuple[Reject, ...]
    rejected: tuple[tuple[Entry, ...], ...]
    refused_slides: int  # how many of `rejects` are slides
    left: Ignored
    folders: tuple[str, ...]  # that hold slides, and what each was taken for, as 'Batch2 Test (test)'

    @property
    def slide_rejects(self) -> tuple[Reject, ...]:
        """Slides that are refused."""
        return self.rejects[: self.refused_slides]

    @property
    def annotation_rejects(self) -> tuple[Reject, ...]:
        """Annotations that are refused; their slides stay without."""
        return self.rejects[self.refused_slides :]

    @property
    def ignored(self) -> tuple[Entry, ...]:
        """All files that are not used."""
        return self.left.entries


def is_slide(path: str) -> bool:
    """Whether a file may be a slide, or (tif) an image of one."""
    stem, _, suffix = path.rpartition("/")[2].rpartition(".")
    if suffix.lower() not in SUFFIXES or not stem or hidden_part(path) is not None:
        return False
    named = annotation_name(path) if suffix.lower() in PLAIN else None
    return named is None or not (named.in_masks or any(reading.word for reading in named.readings))


def find_slides(
    entries: Iterable[Entry],
    masks: Iterable[Entry] = (),
    *,
    slide_regex: str | None = None,
    root: str = "",
    masks_root: str = "",
    heads: Heads | None = None,
    split_given: bool = False,
) -> SlideData:
    """Slides in the order of their paths. `masks` are the files below `data.masks`: annotations only.

    The companions of NAME.mrxs are the files in NAME/; those of DICOM, VMS and VMU are in `heads`. The annotation of a
    slide lies beside it or anywhere below `masks`, under its name (`annotation_names`). A slide is called by its
    stem, or where several have the same by as much of its path as it takes. `split_given`: what folders say of splits
    does not count. `root` and `masks_root` are the URIs put before the paths that rejects name. Codes of slides:
    bad_name ambiguous_folder and those of `heads`; of annotations: duplicate_annotation duplicate_stem
    bad_annotation bad_name.
    """
    listed = sorted(entries, key=lambda entry: entry.path)
    seen = [entry for entry in listed if hidden_part(entry.path) is None or is_bad_path(entry.path)]
    late = sorted(masks, key=lambda entry: entry.path)
    folders = mrxs_folders(seen)
    owners = {entry.path: owner_of(entry.path, folders) for entry in seen} if folders else {}
    mains = _mains(seen, owners)
    main = {entry.path for entry in mains}
    parts, free = find_parts(mains, [entry for entry in seen if entry.path not in main], heads or Heads())
    placing = _Placing(parts, owners, root.rstrip("/"), masks_root.rstrip("/"))
    for entry in free:
        placing.place(entry, "data")
    for entry in late:
        if hidden_part(entry.path) is None:
            placing.place(entry, "masks")
    good: list[SlideFiles] = []
    bad: list[tuple[Reject, tuple[Entry, ...]]] = []
    for number, part in enumerate(parts):
        slide = placing.finished(number)
        try:
            good.append(_checked(slide, part, slide_regex, split_given=split_given))
        except BadInput as defect:
            row = Reject.of(defect, placing.uri(slide.path, "data"), slide.slide_id)
            bad.append((row, (*slide.files, *slide.annotation)))
    used = {entry.path for entry in seen}
    hidden = [entry for entry in listed if entry.path not in used]
    hidden += [entry for entry in late if hidden_part(entry.path) is not None]
    rejected = [*bad, *placing.refused]
    return SlideData(
        slides=tuple(sorted(good, key=lambda slide: slide.path)),
        rejects=tuple(row for row, _ in rejected),
        rejected=tuple(files for _, files in rejected),
        refused_slides=len(bad),
        left=Ignored(tuple(hidden), tuple(placing.previews), tuple(placing.strays), tuple(placing.others)),
        folders=_folders(good),
    )


class _Placing:
    """The slides of a listing, and where each file that is none comes: to a slide, or to what is refused or left."""

    def __init__(self, parts: Sequence[SlideParts], owners: dict[str, str | None], root: str, masks_root: str) -> None:
        self._slides = _called(parts)
        self._names = SlideNames(
            [(slide.path, _naming(part), part.aliases) for slide, part in zip(self._slides, parts, strict=True)]
        )
        self._numbers = {slide.path: number for number, slide in enumerate(self._slides)}
        self._owners = owners
        self._roots = {"data": root, "masks": masks_root}
        self._candidates: list[list[Candidate]] = [[] for _ in parts]
        self._companions: list[list[Entry]] = [[] for _ in parts]  # of MRXS
        self.refused: list[tuple[Reject, tuple[Entry, ...]]] = []
        self.previews: list[Entry] = []
        self.strays: list[Entry] = []
        self.others: list[Entry] = []

    def uri(self, path: str, where: Where) -> str:
        """What a reject calls a file."""
        return f"{self._roots[where]}/{path}"

    def place(self, entry: Entry, where: Where) -> None:
        """Give a file to the slide it annotates or belongs to."""
        named = annotation_name(entry.path)
        found = self._annotates(entry, named) if named else None
        owner = self._owners.get(entry.path) if where == "data" else None
        if owner is not None and (found is None or len(found[0]) > 1 or is_bad_path(entry.path)):
            self._companions[self._numbers[owner]].append(entry)
        elif named and found:
            self._annotate(entry, where, named, *found)
        elif named and (named.says_mask or where == "masks"):
            self.strays.append(entry)
        else:
            self.others.append(entry)

    def _annotates(self, entry: Entry, named: AnnotationName) -> tuple[set[int], Reading] | None:
        """The slides that a file may annotate, by the plainest reading of its name that means any."""
        for reading in named.readings:
            if slides := self._names.closest(entry.path, self._names.meant(reading.name)):
                return slides, reading
        return None

    def _annotate(self, entry: Entry, where: Where, named: AnnotationName, slides: set[int], reading: Reading) -> None:
        if len(slides) > 1:
            names = ", ".join(self._slides[number].path for number in sorted(slides)[:4])
            defect = BadInput("duplicate_stem", f"it may annotate several slides ({names}): name it after one in full")
            self.refused.append((Reject.of(defect, self.uri(entry.path, where), None), (entry,)))
            return
        (number,) = slides
        # the photo of a slide's label is called NAME_label as well
        sure = named.kind != "image" or named.in_masks or where == "masks" or reading.word not in ("", "label")
        kind: AnnotationKind = "fovs" if reading.fov else named.kind
        self._candidates[number].append(Candidate(entry, where, kind, reading.fov, doubtful=not sure))

    def finished(self, number: int) -> SlideFiles:
        """A slide with its companions and its annotation, when all files are placed."""
        slide = self._slides[number]
        chosen = choose_annotation(self._candidates[number])
        self.previews += [one.entry for one in chosen.previews]
        for defect, unit in chosen.refused:
            row = Reject.of(defect, self.uri(unit[0].entry.path, unit[0].where), slide.slide_id)
            self.refused.append((row, tuple(one.entry for one in unit)))
        slide = replace(slide, files=(*slide.files, *self._companions[number]))
        if not chosen.used:
            return slide
        first = chosen.used[0]
        return replace(
            slide,
            kind=first.kind,
            annotation=tuple(one.entry for one in chosen.used),
            annotation_in=first.where,
            doubtful=first.doubtful and first.kind == "image",
        )


def _mains(seen: Sequence[Entry], owners: dict[str, str | None]) -> list[Entry]:
    """The files that are slides: TIFFs are none among the data of an MRXS, nor as QuPath's tile of another slide."""
    indexed = {owners.get(entry.path) for entry in seen if entry.path.lower().endswith("/slidedat.ini")} - {None}
    slides = [
        entry
        for entry in seen
        if is_slide(entry.path) and not (suffix_of(entry.path) in PLAIN and owners.get(entry.path) in indexed)
    ]
    tiles = {entry.path: named for entry in slides if (named := _tile(entry.path))}
    if not tiles:
        return slides
    names = SlideNames([(entry.path, (entry.path,), ()) for entry in slides if entry.path not in tiles])
    of_others = {path for path, named in tiles.items() if any(names.meant(reading.name) for reading in named.readings)}
    return [entry for entry in slides if entry.path not in of_others]


def _tile(path: str) -> AnnotationName | None:
    """The readings of a TIFF that is called as QuPath calls tiles, None for any other file."""
    named = annotation_name(path) if suffix_of(path) in PLAIN else None
    return named if named and any(reading.fov and reading.fov.from_bounds for reading in named.readings) else None


def _naming(part: SlideParts) -> list[str]:
    """The files that an annotation of a slide may be called after."""
    first, *others = (entry.path for entry in part.files)
    return [first, *(path for path in others if suffix_of(path) in NAMED_BY_ALL)]


def _called(parts: Sequence[SlideParts]) -> list[SlideFiles]:
    """The slides with ids that are each one's own: the stem, else the name, else the path."""
    slides = [SlideFiles("", stem_of(part.files[0].path), None, part.files, "") for part in parts]
    choices, images = [], []
    for slide in slides:
        plain = slide.path.rpartition(".")[0]
        short, full = (unicodedata.normalize("NFC", path) for path in (plain, slide.path))
        choices.append((slide.stem, full.rpartition("/")[2], short if "/" in short else full, full, slide.path))
        images.append((plain, slide.path))
    return [
        replace(slide, slide_id=slide_id, image_id=image_id)
        for slide, slide_id, image_id in zip(slides, distinct(choices), distinct(images), strict=True)
    ]


def _checked(slide: SlideFiles, part: SlideParts, slide_regex: str | None, *, split_given: bool) -> SlideFiles:
    """The slide with its split and its id. Raises BadInput where it cannot be used."""
    if any(is_bad_path(entry.path) for entry in slide.files):
        raise BadInput("bad_name", BAD_NAME)
    if part.defect is not None:
        raise part.defect
    if not split_given:
        splits = innermost_splits(slide.path.split("/")[:-1])
        if len(splits) > 1:
            raise BadInput("ambiguous_folder", f"its folder names both {' and '.join(sorted(splits))}; rename it")
        slide = replace(slide, split=next(iter(splits), None))
    if slide_regex is None:
        return slide
    match = re.search(slide_regex, slide.stem)
    found = match and match.group(min(match.re.groups, 1))
    if not found:
        raise BadInput("bad_name", f"data.slide_regex ({slide_regex}) finds no slide id in {slide.stem!r}")
    return replace(slide, slide_id=found)


def _folders(slides: Iterable[SlideFiles]) -> tuple[str, ...]:
    taken: dict[str, set[str]] = defaultdict(set)
    for slide in slides:
        taken[slide.path.rpartition("/")[0]].add(slide.split or "no split")
    return tuple(f"{folder or '.'} ({', '.join(sorted(splits))})" for folder, splits in sorted(taken.items()))


def fov_origin(entry: Entry, bounds: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """Level-0 (x, y) that the name of an FOV's mask gives; QuPath counts from the slide's `bounds`."""
    fov = fov_of(entry.path)
    if fov is None:
        raise ValueError(entry.path)
    return (fov.x + bounds[0], fov.y + bounds[1]) if fov.from_bounds else (fov.x, fov.y)
