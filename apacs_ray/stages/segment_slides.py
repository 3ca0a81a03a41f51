"""The slides that are to be segmented: what is listed, what restricts each, and which are done already."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from apacs_ray.config.settings import TilesSettings
from apacs_ray.data.rejects import Reject
from apacs_ray.data.slide_tables import read_mpps, read_table_text
from apacs_ray.errors import UsageError
from apacs_ray.inference.model_files import ModelFiles
from apacs_ray.inference.planning import Region
from apacs_ray.inference.segment_steps import STAGE
from apacs_ray.outputs.slide_files import SLIDE_JSON
from apacs_ray.runs.provenance import fingerprint
from apacs_ray.runs.run import Run
from apacs_ray.slides.cache import SlideCache
from apacs_ray.slides.listing import slides_at
from apacs_ray.slides.manifest import SlideTask
from apacs_ray.slides.slide_files import SlideFiles
from apacs_ray.stages.source import require_clear, say_found
from apacs_ray.storage import Store, open_store

VERSION = 1  # of what is written for a slide


@dataclass(frozen=True)
class ListedSlide:
    """A slide that is to be segmented: its files, how it is read, what restricts it, its fingerprint."""

    files: SlideFiles
    reading: SlideTask
    region: Region | None
    fingerprint: str

    @property
    def folder(self) -> str:
        """Of its results."""
        return self.files.slide_id

    @property
    def parts(self) -> str:
        """The folder of its parts, until the results are there."""
        return f"{self.folder}/.parts-{self.fingerprint[:8]}"


def list_slides(run: Run, models: ModelFiles, uris: Sequence[str]) -> tuple[list[ListedSlide], list[Reject]]:
    """Find the slides, and give each its fingerprint.

    Args:
        run: The output.
        models: That will segment them.
        uris: Folders of slides, or single slides.

    Returns:
        The slides, and a row for each that is refused.

    Raises:
        UsageError: There are none, or two of one name.
    """
    settings = run.settings
    rejects: list[Reject] = []
    mpps = read_mpps(read_table_text(settings.data.mpps))
    cache = SlideCache.of(settings.data)
    roi = None
    if settings.segment.roi is not None:
        folder, _, name = settings.segment.roi.rpartition("/")
        place = open_store(folder or ".")
        roi = Region(place, name, place.version(name))
        if roi.version is None:
            raise UsageError(f"segment.roi {settings.segment.roi}: no such file")
    listed: list[ListedSlide] = []
    for uri in uris:
        found = slides_at(uri, settings.data.slide_regex)
        store, data = found.store, found.data
        say_found(data, STAGE)
        rejects += [replace(reject, stage=STAGE) for reject in data.slide_rejects]
        require_clear(data.slides, mpps, "data.mpps")
        tiles = TilesSettings()
        for slide in found.slides:
            beside = found.region_beside(slide)
            region = roi or (Region(store, beside.path, beside.version) if beside else None)
            files = replace(slide, kind=None, annotation=())
            mark = fingerprint(
                stage=STAGE,
                version=VERSION,
                slide=[(entry.path, entry.size, entry.version) for entry in files.files],
                region=region and region.version,
                models=dict(models.sha256),
                mpp=settings.segment.mpp or models.mpp,
                own_mpp=mpps.get(slide.slide_id) or settings.data.mpp,
                engine=settings.data.engine,
                plane=settings.data.plane,
                settings=settings.segment.fingerprint_inputs(),
            )
            reading = SlideTask(store, None, run.store, tiles, settings.data, cache, mark, mpps)
            listed.append(ListedSlide(files, reading, region, mark))
    if not listed and not rejects:
        raise UsageError(f"{', '.join(uris)}: no slides there")
    for name, count in Counter(one.files.slide_id for one in listed).items():
        if count > 1:
            raise UsageError(f"{count} slides are called {name!r}; segment them to an --output each")
    return listed, rejects


def finished_record(output: Store, slide: ListedSlide) -> dict[str, Any] | None:
    """Return the `slide.json` of a slide that is done with this fingerprint and whose files are there; else None.

    What is left of parts, of this or of earlier settings, goes when it is done.
    """
    sizes = {entry.path: entry.size for entry in output.list(slide.folder)}
    if f"{slide.folder}/{SLIDE_JSON}" not in sizes:
        return None
    try:
        record = json.loads(output.read(f"{slide.folder}/{SLIDE_JSON}"))
        files = {f"{slide.folder}/{name}": facts["size"] for name, facts in record["files"].items()}
        if record["fingerprint"] != slide.fingerprint or not files.items() <= sizes.items():
            return None
    except (ValueError, LookupError, TypeError, AttributeError):  # damaged: it is written anew
        return None
    forget_parts(output, slide.folder, sizes)
    return dict(record)


def forget_parts(output: Store, folder: str, paths: Iterable[str]) -> None:
    """Delete the parts of a slide among `paths`, and files that a killed process left half written."""
    paths = list(paths)
    below = re.compile(rf"({re.escape(folder)}/\.parts-\w+)/")
    for parts in sorted({match[1] for match in map(below.match, paths) if match}):
        output.delete_folder(parts)
    half = re.compile(rf"{re.escape(folder)}/\.[^/]+\.tmp")
    for path in filter(half.fullmatch, paths):
        output.delete(path)
