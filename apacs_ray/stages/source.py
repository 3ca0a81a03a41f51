"""The data of a run: where it is, and what lies there, listed once, so that what is cut is what the fingerprint saw."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from apacs_ray.config.settings import Settings
from apacs_ray.console import say
from apacs_ray.data.folders import FolderData, Pair, find_pairs, is_folder_layout
from apacs_ray.data.nested_stores import entries_outside, is_inside, same_folder
from apacs_ray.data.slide_tables import read_splits, read_table_text
from apacs_ray.errors import UsageError
from apacs_ray.runs.provenance import fingerprint
from apacs_ray.slides.companions import read_heads
from apacs_ray.slides.find import PLAIN, find_slides, is_slide
from apacs_ray.slides.slide_files import SlideData, SlideFiles
from apacs_ray.storage import Entry, Store, open_store
from apacs_ray.synthetic import slide as synthetic

Unit = TypeVar("Unit", Pair, SlideFiles)
LONGEST = 300  # characters of the line that says what folders were taken for


@dataclass(frozen=True)
class Source:
    """Images with masks, whole slides, or the synthetic smears of a run.

    Everything is found when it is first asked for, and once: synthetic smears are rendered before that.

    Attributes:
        store: Where the source images are.
        settings: Of the run.
        output: Where the run lies: what lies there never is data.
        is_synthetic: Whether this run renders them itself.
    """

    store: Store
    settings: Settings
    output: Store
    is_synthetic: bool = False

    @classmethod
    def of(cls, output: Store, data: str | None, settings: Settings) -> Source:
        """Return what `--data` names; without it the synthetic smears of the run at `output`."""
        if data is not None:
            return cls(open_store(data), settings, output)
        smears = fingerprint(**smears_inputs(settings))
        return cls(output.child(f"synthetic/{smears[:8]}"), settings, output, is_synthetic=True)

    @cached_property
    def listing(self) -> list[Entry]:
        """All objects below the data, less the run's own.

        Raises:
            UsageError: when the data is the run's own folder.
        """
        if same_folder(self.store, self.output):
            raise UsageError(f"{self.output.uri}: --output is the folder of --data; choose another one")
        return self._others(self.store)

    @cached_property
    def masks_store(self) -> Store | None:
        """Where `data.masks` is; None where it is not given, or is the data itself."""
        uri = self.settings.data.masks
        store = open_store(uri) if uri else None
        return None if store is None or same_folder(store, self.store) else store

    @cached_property
    def masks_listing(self) -> list[Entry]:
        """All objects below `data.masks`.

        Raises:
            UsageError: when nothing lies there.
        """
        if self.masks_store is None:
            return []
        entries = self._others(self.masks_store)
        if not entries:
            raise UsageError(f"data.masks {self.masks_store.uri}: nothing there")
        return entries

    @cached_property
    def entries(self) -> list[Entry]:
        """What is data: all that is listed, less what lies below `data.masks` and has another role."""
        masks = self.masks_store
        if masks is None or is_inside(self.store, masks):
            return self.listing
        return entries_outside(self.store, self.listing, masks)

    @cached_property
    def mask_entries(self) -> list[Entry]:
        """What lies below `data.masks`, less the data."""
        masks = self.masks_store
        if masks is None or not is_inside(self.store, masks):
            return self.masks_listing
        return entries_outside(masks, self.masks_listing, self.store)

    @cached_property
    def holds_folders(self) -> bool:
        """Whether the data is folders of images and masks (else whole slides).

        Raises:
            UsageError: for both or neither.
        """
        return holds_folders(self.store.uri, self.entries)

    @cached_property
    def folder_data(self) -> FolderData:
        """Pairs of image and mask, as the folders' names say."""
        data = find_pairs(self.entries, root=self.store.uri, slide_regex=self.settings.data.slide_regex)
        say_found(data)
        return data

    @cached_property
    def pairs(self) -> list[Pair]:
        """Pairs with their splits.

        Raises:
            UsageError: when `data.splits` lacks one.
        """
        return with_given_splits(self.folder_data.pairs, self.settings.data.splits)

    @cached_property
    def slide_data(self) -> SlideData:
        """Slides with their companions and annotations.

        No slide is opened: of DICOM and VMS the first bytes are read, which tell what belongs together.
        """
        masks = self.masks_store
        data = find_slides(
            self.entries,
            self.mask_entries,
            slide_regex=self.settings.data.slide_regex,
            root=self.store.uri,
            masks_root=masks.uri if masks else "",
            heads=read_heads(self.store, self.entries),
            split_given=self.settings.data.splits is not None,
        )
        say_found(data)
        return data

    @cached_property
    def slides(self) -> list[SlideFiles]:
        """Slides with their splits.

        Raises:
            UsageError: when `data.splits` lacks one.
        """
        return with_given_splits(self.slide_data.slides, self.settings.data.splits)

    @property
    def used(self) -> list[tuple[str, ...]]:
        """What the tiles and rejects depend on: every unit with its files and their versions, and what is rejected.

        Files that belong to nothing are not among them.
        """
        units: list[tuple[Any, ...]]
        if self.holds_folders:
            rejected = self.folder_data.rejected
            units = [(pair.slide_id, pair.split, "", (pair.image, pair.mask)) for pair in self.pairs]
        else:
            rejected = self.slide_data.rejected
            units = [
                (slide.slide_id, slide.split, slide.kind, (*slide.files, *slide.annotation)) for slide in self.slides
            ]
        units += [("", "", "rejected", files) for files in rejected]
        return sorted(tuple(map(str, (*names, *map(_version, files)))) for *names, files in units)

    def require_training_splits(self) -> None:
        """Check, before anything is cut, that there will be something to train on and something to test on.

        Where no unit is left at all the reasons are the rejects, which ingest writes.

        Raises:
            UsageError: naming what is missing.
        """
        if self.is_synthetic:
            return
        if self.holds_folders:
            self._require_pairs()
        else:
            self._require_slides()

    def _others(self, store: Store) -> list[Entry]:
        """All objects of a store, less those of the run."""
        entries = list(store.list())
        return entries_outside(store, entries, self.output) if is_inside(self.output, store) else entries

    def _require_pairs(self) -> None:
        rejects = self.folder_data.rejects
        for split in ("train", "test") if self.pairs else ():
            if not any(pair.split == split for pair in self.pairs):
                rejected = f"; {len(rejects)} rejected, first {rejects[0].reason}" if rejects else ""
                folders = ", ".join(self.folder_data.folders[:5])
                raise UsageError(
                    f"{self.store.uri}: no {split} image with a mask of the same stem (found: {folders}{rejected})"
                )

    def _require_slides(self) -> None:
        unknown = [slide.slide_id for slide in self.slides if slide.split is None]
        if unknown:
            raise UsageError(
                f"{self.store.uri}: to train or to test? {len(unknown)} slides say neither, first {unknown[0]!r}: put "
                "them in folders named train, val and test, or name their splits in data.splits"
            )
        rejects = self.slide_data.slide_rejects
        for split in ("train", "test") if self.slides else ():
            if not any(slide.split == split for slide in self.slides):
                first = f"; {len(rejects)} rejected, first {rejects[0].uri}: {rejects[0].reason}" if rejects else ""
                raise UsageError(f"{self.store.uri}: no {split} slide among {len(self.slides)}{first}")


def smears_inputs(settings: Settings) -> dict[str, Any]:
    """Return what the synthetic smears depend on."""
    return {
        "smears": settings.synthetic.fingerprint_inputs(),
        "version": synthetic.VERSION,
        "seed": settings.run.seed,
    }


def holds_folders(uri: str, entries: Sequence[Entry]) -> bool:
    """Tell folders of images and masks from whole slides.

    Returns:
        True for folders.

    Raises:
        UsageError: for both or neither, naming `uri` and what was found.
    """
    suffixes = Counter(entry.path.rpartition(".")[2].lower() for entry in entries if is_slide(entry.path))
    if is_folder_layout(entries):
        slides = {suffix: count for suffix, count in suffixes.items() if suffix not in PLAIN}
        if slides:
            raise UsageError(
                f"{uri}: holds folders of images and masks, and slides ({_counted(slides)}): give one of them"
            )
        return True
    if not suffixes:
        others = Counter(entry.path.rpartition(".")[2].lower() for entry in entries)
        raise UsageError(
            f"{uri}: neither folders whose names hold train|val|test and input|groundtruth, nor slides "
            f"(found: {_counted(dict(others.most_common(4))) or 'nothing'})"
        )
    return False


def with_given_splits(units: Sequence[Unit], uri: str | None) -> list[Unit]:
    """Give pairs or slides the split that the table `data.splits` at `uri` names for their slide.

    Returns:
        The units in their order; as they are without a table.

    Raises:
        UsageError: naming the first slide that has no line.
    """
    text = read_table_text(uri)
    if text is None:
        return list(units)
    splits = read_splits(text)
    require_clear(units, splits, "data.splits")
    missing = sorted({unit.slide_id for unit in units} - set(splits))
    if missing:
        raise UsageError(f"data.splits: {len(missing)} slides have no line there, first {missing[0]!r}")
    return [replace(unit, split=splits[unit.slide_id]) for unit in units]


def require_clear(units: Sequence[Unit], names: Collection[str], setting: str) -> None:
    """Check that no name in a table is a stem that several slides share.

    Raises:
        UsageError: naming the table's `setting` and the slides.
    """
    ids = {unit.slide_id for unit in units}
    for stem in sorted({unit.stem for unit in units} & set(names) - ids):
        slides = sorted(unit.slide_id for unit in units if unit.stem == stem)
        if len(slides) > 1:
            several = ", ".join(slides[:4])
            raise UsageError(f"{setting}: {stem!r} may be each of {len(slides)} slides, call them {several}")


def say_found(data: FolderData | SlideData, stage: str = "ingest") -> None:
    """Say what each folder was taken for, and what is not used."""
    folders, more = "", 0
    for folder in data.folders:
        text = f"{folders}, {folder}" if folders else folder
        if more or (len(text) > LONGEST and folders):
            more += 1
        else:
            folders = text[:LONGEST]
    if folders:
        say(f"{stage}: folders: {folders}{f' and {more} more' if more else ''}")
    ignored = data.left.describe()
    if ignored:
        say(f"{stage}: {ignored}")


def _version(entry: Entry) -> tuple[str, int, str]:
    return entry.path, entry.size, entry.version


def _counted(suffixes: dict[str, int]) -> str:
    return ", ".join(f"{count} .{suffix}" for suffix, count in suffixes.items())
