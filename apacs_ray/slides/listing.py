"""The slides at a URI: a folder of them, plain pictures among them, or a single one; with what restricts each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from apacs_ray.errors import UsageError
from apacs_ray.slides.companions import read_heads
from apacs_ray.slides.find import find_slides
from apacs_ray.slides.image_slide import SUFFIXES
from apacs_ray.slides.slide_files import SlideData, SlideFiles
from apacs_ray.storage import Entry, Store, is_bad_path, open_store

ROI = ".roi.geojson"


@dataclass(frozen=True)
class FoundSlides:
    """What was found at a URI.

    Attributes:
        store: Where it lies.
        data: Slides with their companions, and what is refused or left.
        pictures: Plain pictures that belong to no slide: slides of one level.
        regions: Annotations that restrict a slide, by path.
    """

    store: Store
    data: SlideData
    pictures: tuple[SlideFiles, ...]
    regions: Mapping[str, Entry]

    @property
    def slides(self) -> tuple[SlideFiles, ...]:
        """All slides."""
        return (*self.data.slides, *self.pictures)

    def region_beside(self, slide: SlideFiles) -> Entry | None:
        """Return what restricts a slide, None where nothing does."""
        return self.regions.get(f"{slide.path.rpartition('.')[0]}{ROI}")


def slides_at(uri: str, slide_regex: str | None) -> FoundSlides:
    """Find slides.

    Args:
        uri: A folder with slides, or a slide.
        slide_regex: `data.slide_regex`.

    Returns:
        What is there.

    Raises:
        UsageError: Nothing is there.
    """
    store, entries = _entries(uri)
    regions = {entry.path: entry for entry in entries if entry.path.endswith(ROI)}
    data = find_slides(
        [entry for entry in entries if entry.path not in regions],
        slide_regex=slide_regex,
        root=store.uri,
        heads=read_heads(store, entries),
        split_given=True,
    )
    pictures = _pictures(data.left.others)
    used = {picture.path for picture in pictures}
    others = tuple(entry for entry in data.left.others if entry.path not in used)
    return FoundSlides(store, replace(data, left=replace(data.left, others=others)), tuple(pictures), regions)


def _pictures(entries: Iterable[Entry]) -> list[SlideFiles]:
    """Plain pictures that belong to no slide: slides of one level, called by their path."""
    pictures = []
    for entry in entries:
        stem, _, suffix = entry.path.rpartition(".")
        if suffix.lower() in SUFFIXES and not is_bad_path(entry.path):
            pictures.append(SlideFiles(stem, stem.rpartition("/")[2], None, (entry,), stem))
    return pictures


def _entries(uri: str) -> tuple[Store, list[Entry]]:
    """The store of a folder of slides with all that is in it; or of one slide, with what is named after it."""
    store = open_store(uri)
    entries = list(store.list())
    if entries:
        return store, entries
    folder, _, name = uri.rstrip("/").rpartition("/")
    store, stem = open_store(folder or "."), name.rpartition(".")[0]
    named = (f"{stem or name}/", f"{stem or name}.")
    entries = [entry for entry in store.list() if entry.path == name or entry.path.startswith(named)]
    if all(entry.path != name for entry in entries):
        raise UsageError(f"--slides {uri}: nothing there")
    return store, entries
