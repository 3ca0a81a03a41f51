"""Names of annotation files: which slide a file annotates, in which format, and which part of it.

An annotation is called as its slide, with or without the slide's own suffix: NAME.geojson, NAME.svs.geojson; JSON and
XML may be compressed (.gz, .zip). A mask image may say that it is one (NAME_mask.png), and of which field of view it
is: NAME_X_Y.png, NAME/X_Y.png, or as QuPath exports tiles, `NAME [x=0,y=512,w=512,h=512].png`. Case and stray spaces
count only where several slides differ in nothing else.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from apacs_ray.data.words import is_mask_folder, mask_stem
from apacs_ray.storage import Entry

AnnotationKind = Literal["geojson", "xml", "image", "fovs"]
JPEG = ("jpg", "jpeg")  # lossy: such a picture is no mask
_DRAWN = re.compile(r"(?s)(?P<base>.+)\.(?:(?P<json>geojson|json)|xml)(?:\.(?:gz|zip))?", re.IGNORECASE)
_IMAGE = re.compile(r"(?s)(?P<base>.+)\.(?:png|tiff?|bmp|jpe?g)", re.IGNORECASE)
_OME = re.compile(r"(?s)(?P<base>.+)\.ome", re.IGNORECASE)
_SUFFIX = re.compile(r"(?s)(?P<stem>.*?)(?:(?:\.ome)?\.tiff?|\.[^.]*)", re.IGNORECASE)
_FOV = re.compile(r"(?s)(?:(?P<stem>.*)[_\- ])?x?(?P<x>[0-9]+)[_\-]y?(?P<y>[0-9]+)", re.IGNORECASE)
_TILE = re.compile(r"(?s)(?P<stem>.*?)\s*\[(?P<fields>[a-z]=[0-9.]+(?:, ?[a-z]=[0-9.]+)*)\]", re.IGNORECASE)
_SPACES = re.compile(r"\s+")
_AROUND = re.compile(r" ?([._\-]) ?")


def stem_of(path: str) -> str:
    """Return the name of a file without its suffix, in Unicode's NFC; `.ome.tif` is one suffix."""
    name = unicodedata.normalize("NFC", path.rpartition("/")[2])
    match = _SUFFIX.fullmatch(name)
    return match["stem"] if match else name


@dataclass(frozen=True)
class Fov:
    """A field of view.

    Attributes:
        x: left edge, px of the full resolution.
        y: top edge, px of the full resolution.
        downsample: px of the full resolution per mask px.
        from_bounds: counted from the slide's bounds, as QuPath does, and not from its corner.
    """

    x: int
    y: int
    downsample: float = 1.0
    from_bounds: bool = False  # counted from the slide's bounds, as QuPath does, and not from its corner


@dataclass(frozen=True)
class Reading:
    """One way to understand a file's name. `word` is what says that it is a mask, '' where nothing does."""

    name: str
    word: str = ""
    fov: Fov | None = None


@dataclass(frozen=True)
class AnnotationName:
    """A file that may annotate a slide: what it is, and the ways to read its name, the plainest first."""

    kind: Literal["geojson", "xml", "image"]
    readings: tuple[Reading, ...]
    in_masks: bool  # its folder says that it holds masks

    @property
    def says_mask(self) -> bool:
        """Whether its name or folder can only mean an annotation, even if its slide is not known."""
        tile = any(reading.fov and reading.fov.from_bounds for reading in self.readings)
        return self.kind != "image" or self.in_masks or tile or any(reading.word for reading in self.readings)


def annotation_name(path: str) -> AnnotationName | None:
    """Return how a file's name can be read as that of an annotation; None when it cannot."""
    *folders, name = unicodedata.normalize("NFC", path).split("/")
    in_masks = any(is_mask_folder(folder) for folder in folders)
    drawn = _DRAWN.fullmatch(name.strip())
    if drawn:
        readings = [Reading(drawn["base"]), *_masks([drawn["base"]])]
        return AnnotationName("geojson" if drawn["json"] else "xml", tuple(readings), in_masks)
    image = _IMAGE.fullmatch(name.strip())
    if image is None:
        return None
    ome = _OME.fullmatch(image["base"])
    bases = [image["base"], *([ome["base"]] if ome else [])]
    around = next((folder for folder in reversed(folders) if not is_mask_folder(folder)), "")
    readings = [
        Reading(name),
        *map(Reading, bases),
        *_masks(bases),
        *(r for base in bases for r in _fovs(base, around)),
    ]
    return AnnotationName("image", tuple(readings), in_masks)


def _masks(bases: Iterable[str]) -> Iterator[Reading]:
    for base in bases:
        if (name_and_word := mask_stem(base)) is not None:
            yield Reading(*name_and_word)


def _fovs(base: str, around: str) -> Iterator[Reading]:
    """Yield a name that ends with a place, before or after the words that say that it is a mask."""
    stem, word = mask_stem(base) or (base, "")
    tile, place = _TILE.fullmatch(stem.strip()), _FOV.fullmatch(stem)
    try:
        if tile:
            fields = dict(field.strip().lower().split("=") for field in tile["fields"].split(","))
            name = str(tile["stem"])
            fov = Fov(int(fields["x"]), int(fields["y"]), float(fields.get("d", "1")), from_bounds=True)
        elif place:
            name, fov = place["stem"] or "", Fov(int(place["x"]), int(place["y"]))
        else:
            return
    except (KeyError, ValueError):  # fields that are no numbers, as d=1.2.3
        return
    yield Reading(name or around, word, fov)
    if (plain := mask_stem(name)) is not None:
        yield Reading(plain[0], word or plain[1], fov)


def fov_of(path: str) -> Fov | None:
    """Return the field of view that the name of a mask gives; None when it gives none."""
    named = annotation_name(path)
    return next((reading.fov for reading in named.readings if reading.fov), None) if named else None


def fov_origin(entry: Entry, bounds: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """Return the level-0 (x, y) that the name of an FOV's mask gives.

    Args:
        entry: the mask's file.
        bounds: level-0 (x, y) of the slide's bounds, from which QuPath counts.

    Returns:
        Level-0 px.

    Raises:
        ValueError: the name gives no field of view.
    """
    fov = fov_of(entry.path)
    if fov is None:
        raise ValueError(entry.path)
    return (fov.x + bounds[0], fov.y + bounds[1]) if fov.from_bounds else (fov.x, fov.y)


class SlideNames:
    """The names of the slides of a listing, by which annotations find their slide."""

    def __init__(self, names: Sequence[tuple[str, Sequence[str], Sequence[str]]]) -> None:
        """Index the slides by their names.

        Args:
            names: of each slide the path of its main file, the paths of all files that carry its name, and its aliases.
        """
        self._folders = [tuple(path.split("/")[:-1]) for path, _, _ in names]
        self._levels: list[dict[str, set[int]]] = [defaultdict(set) for _ in range(6)]
        for number, (_, paths, aliases) in enumerate(names):
            full = {unicodedata.normalize("NFC", path.rpartition("/")[2]) for path in paths}
            short = {name.rpartition(".")[0] for name in full} | {stem_of(name) for name in full}
            for level, known in enumerate((full, short, {unicodedata.normalize("NFC", alias) for alias in aliases})):
                for name in known - {""}:
                    self._levels[level][name].add(number)
                    self._levels[level + 3][_folded(name)].add(number)

    def meant(self, name: str) -> set[int]:
        """Return the slides of a name: in full before those without suffix, as written before another case."""
        folded = _folded(name)
        for level, known in enumerate(self._levels):
            numbers = known.get(name if level < 3 else folded)
            if numbers:
                return numbers
        return set()

    def closest(self, path: str, slides: set[int]) -> set[int]:
        """Return those of some slides that lie nearest to a file: in its folder, or one with the same last parts."""
        if len(slides) < 2:
            return slides
        folders = tuple(path.split("/")[:-1])
        beside = {number for number in slides if self._folders[number] == folders}
        if beside:
            return beside
        shared = {number: _shared(folders, self._folders[number]) for number in slides}
        most = max(shared.values())
        return {number for number in slides if shared[number] == most}


def _folded(name: str) -> str:
    """Return a name without regard to case and stray spaces."""
    return _AROUND.sub(r"\1", _SPACES.sub(" ", name).strip()).casefold()


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """Return how many of the last folders two paths have in common, beside those of masks."""
    count = 0
    plain = [[folder for folder in folders if not is_mask_folder(folder)] for folders in (one, other)]
    for mine, yours in zip(reversed(plain[0]), reversed(plain[1]), strict=False):
        if mine != yours:
            break
        count += 1
    return count
