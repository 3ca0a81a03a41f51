"""The assignment of files to slides: to which slide of a listing each other file belongs."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from apacs_ray.data.rejects import Reject
from apacs_ray.data.words import distinct
from apacs_ray.errors import BadInput
from apacs_ray.slides.annotations.choose import Candidate, choose_annotation
from apacs_ray.slides.annotations.names import (
    AnnotationKind,
    AnnotationName,
    Reading,
    SlideNames,
    annotation_name,
    stem_of,
)
from apacs_ray.slides.companions import SlideParts, suffix_of
from apacs_ray.slides.slide_files import SlideFiles, Where
from apacs_ray.storage import Entry, is_bad_path

NAMED_BY_ALL = {"dcm"}  # annotations may be named after any file of such a slide, not just the one that is opened


class Placing:
    """The slides of a listing, and where each other file belongs: to a slide, to the rejects, or to no slide."""

    def __init__(self, parts: Sequence[SlideParts], owners: dict[str, str | None], root: str, masks_root: str) -> None:
        """Start with the slides; the other files follow by `place`.

        Args:
            parts: the slides' own files.
            owners: path -> the .mrxs in whose folder it lies.
            root: URI of the data, for rejects.
            masks_root: URI of `data.masks`, for rejects.
        """
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
        """Return the URI by which a reject names a file."""
        return f"{self._roots[where]}/{path}"

    def place(self, entry: Entry, where: Where) -> None:
        """Give a file to the slide it annotates or belongs to."""
        named = annotation_name(entry.path)
        annotated = self._annotates(entry, named) if named else None
        owner = self._owners.get(entry.path) if where == "data" else None
        if owner is not None and (annotated is None or len(annotated[0]) > 1 or is_bad_path(entry.path)):
            self._companions[self._numbers[owner]].append(entry)
        elif named and annotated:
            self._annotate(entry, where, named, *annotated)
        elif named and (named.says_mask or where == "masks"):
            self.strays.append(entry)
        else:
            self.others.append(entry)

    def _annotates(self, entry: Entry, named: AnnotationName) -> tuple[set[int], Reading] | None:
        """Return the slides that a file may annotate, by the plainest reading of its name that means any."""
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
        """Return a slide with its companions and its annotation, when all files are placed."""
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


def _naming(part: SlideParts) -> list[str]:
    """Return the files that an annotation of a slide may be called after."""
    first, *others = (entry.path for entry in part.files)
    return [first, *(path for path in others if suffix_of(path) in NAMED_BY_ALL)]


def _called(parts: Sequence[SlideParts]) -> list[SlideFiles]:
    """Return the slides with ids that are each one's own: the stem, else the name, else the path."""
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
