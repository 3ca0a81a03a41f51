"""A slide as files: its own, and those that annotate it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from apacs_ray.data.ignored import Ignored
from apacs_ray.data.rejects import Reject
from apacs_ray.data.words import Split
from apacs_ray.slides.annotations.names import AnnotationKind
from apacs_ray.storage import Entry

Where = Literal["data", "masks"]


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
    def size(self) -> int:
        """Bytes of its own files."""
        return sum(entry.size for entry in self.files)

    @property
    def version(self) -> str:
        """Changes when any of its files does."""
        return "+".join(entry.version for entry in (*self.files, *self.annotation))


@dataclass(frozen=True)
class SlideData:
    """The slides of a listing. Each file is in one slide (its own files, its annotation), in `rejected` or in `left`.

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
