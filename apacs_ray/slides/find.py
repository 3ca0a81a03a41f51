"""Whole slides in a listing of files, with their companions and annotations. Nothing is opened here.

What has to be read for it, the heads of DICOM, VMS and VMU, `companions.read_heads` reads before.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace

from apacs_ray.data.ignored import Ignored, hidden_part
from apacs_ray.data.rejects import BAD_NAME, Reject
from apacs_ray.data.words import innermost_splits
from apacs_ray.errors import BadInput
from apacs_ray.slides.annotations.names import (
    AnnotationName,
    SlideNames,
    annotation_name,
)
from apacs_ray.slides.companions import Heads, SlideParts, find_parts, mrxs_folders, owner_of, suffix_of
from apacs_ray.slides.placing import Placing
from apacs_ray.slides.slide_files import SlideData, SlideFiles
from apacs_ray.storage import Entry, is_bad_path

PLAIN = {"tif", "tiff"}  # suffixes of slides, and of plain images and masks
SUFFIXES = {"mrxs", "svs", "ndpi", "scn", "vms", "vmu", "bif", "svslide", "dcm"} | PLAIN


def is_slide(path: str) -> bool:
    """Tell whether a file may be a slide, or (tif) an image of one."""
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
    """Find the slides of a listing.

    The companions of NAME.mrxs are the files in NAME/; those of DICOM, VMS and VMU are in `heads`. The annotation of a
    slide lies beside it or anywhere below `masks`, under its name (`annotation_name`). A slide is called by its stem,
    or where several have the same by as much of its path as it takes.

    Args:
        entries: files of the data.
        masks: files below `data.masks`: annotations only.
        slide_regex: searched in the stem; its first group, or without groups the whole match, is the slide id.
        root: URI put before the paths of `entries` that rejects name.
        masks_root: URI put before the paths of `masks` that rejects name.
        heads: `read_heads` of `entries`.
        split_given: what folders say of splits does not count.

    Returns:
        Slides in the order of their paths, and what is no slide's. Codes of slides: bad_name ambiguous_folder and those
        of `heads`; of annotations: duplicate_annotation duplicate_stem bad_annotation bad_name.
    """
    listed = sorted(entries, key=lambda entry: entry.path)
    seen = [entry for entry in listed if hidden_part(entry.path) is None or is_bad_path(entry.path)]
    late = sorted(masks, key=lambda entry: entry.path)
    folders = mrxs_folders(seen)
    owners = {entry.path: owner_of(entry.path, folders) for entry in seen} if folders else {}
    mains = _mains(seen, owners)
    main = {entry.path for entry in mains}
    parts, free = find_parts(mains, [entry for entry in seen if entry.path not in main], heads or Heads())
    placing = Placing(parts, owners, root.rstrip("/"), masks_root.rstrip("/"))
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


def _mains(seen: Sequence[Entry], owners: dict[str, str | None]) -> list[Entry]:
    """Return the files that are slides: no TIFFs among the data of an MRXS, nor QuPath's tiles of another slide."""
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
    """Return the readings of a TIFF that is called as QuPath calls tiles, None for any other file."""
    named = annotation_name(path) if suffix_of(path) in PLAIN else None
    return named if named and any(reading.fov and reading.fov.from_bounds for reading in named.readings) else None


def _checked(slide: SlideFiles, part: SlideParts, slide_regex: str | None, *, split_given: bool) -> SlideFiles:
    """Return the slide with its split and its id. Raises BadInput where it cannot be used."""
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
    slide_id = match and match.group(min(match.re.groups, 1))
    if not slide_id:
        raise BadInput("bad_name", f"data.slide_regex ({slide_regex}) finds no slide id in {slide.stem!r}")
    return replace(slide, slide_id=slide_id)


def _folders(slides: Iterable[SlideFiles]) -> tuple[str, ...]:
    taken: dict[str, set[str]] = defaultdict(set)
    for slide in slides:
        taken[slide.path.rpartition("/")[0]].add(slide.split or "no split")
    return tuple(f"{folder or '.'} ({', '.join(sorted(splits))})" for folder, splits in sorted(taken.items()))
