"""COCO's JSON of one or several slides: the polygons and run lengths that belong to one of them, of any category."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
from shapely.geometry import GeometryCollection, Polygon

from apacs_ray.errors import BadInput
from apacs_ray.slides.annotations.run_lengths import outlines, run_lengths
from apacs_ray.slides.annotations.shapes import MALFORMED, Drawing, Shape, class_names, polygon_of, shortened

MAX_RUNS = 1_000_000  # of all masks of a slide; each becomes a few corners
# endings of slides' and annotations' files, without which their names are compared
ENDINGS = re.compile(
    r"\.(gz|zip|json|geojson|coco|ome|tiff?|svs|ndpi|mrxs|scn|bif|vms|vmu|dcm|svslide|png|jpe?g|bmp|webp)$",
    re.IGNORECASE,
)


def is_coco(tree: Any) -> bool:
    """Tell whether a JSON tree is COCO's."""
    return isinstance(tree, dict) and all(isinstance(tree.get(key), list) for key in ("images", "annotations"))


def read_coco(tree: dict[str, Any], name: str) -> Drawing:
    """Return the annotations of the image that is called like `name`, or of the only image.

    Args:
        tree: a JSON tree for which `is_coco` holds.
        name: of the annotation file.

    Returns:
        Its shapes, in px of that image.

    Raises:
        BadInput: bad_annotation; it is not clear which image is meant, or its masks have too many runs.
    """
    images = [image for image in tree["images"] if isinstance(image, dict) and "id" in image]
    image = _image_called(images, name)
    here, known = str(image["id"]), {str(image["id"]) for image in images}
    annotations: list[tuple[int, Any]] = []
    for number, annotation in enumerate(tree["annotations"]):
        image_id = annotation.get("image_id", here) if isinstance(annotation, dict) else here
        if str(image_id) == here or str(image_id) not in known:
            annotations.append((number, annotation))
    categories = tree.get("categories")
    names = {
        str(category.get("id")): str(category.get("name", ""))
        for category in (categories if isinstance(categories, list) else [])
        if isinstance(category, dict)
    }
    _require_few_runs(annotations)
    size = _size_of(image, annotations)
    return Drawing("COCO", _shapes(annotations, here, names, size), size=size)


def _image_called(images: list[dict[str, Any]], name: str) -> dict[str, Any]:
    wanted = _bare(name)
    same = [image for image in images if _bare(str(image.get("file_name", ""))) == wanted]
    if len(same) == 1:
        return same[0]
    if len(images) == 1 and not same:
        return images[0]
    listed = ", ".join(shortened(image.get("file_name")) for image in (same or images)[:3]) or "none"
    problem = f"{len(same)} images called {shortened(wanted)}" if same else f"{len(images)} images, none called so"
    raise BadInput("bad_annotation", f"COCO with {problem} ({listed}): which one is the slide?")


def _bare(path: str) -> str:
    """Return a file's name without folders and endings, as it is compared."""
    name = unicodedata.normalize("NFC", path.replace("\\", "/").rpartition("/")[2]).strip().casefold()
    while (shorter := ENDINGS.sub("", name)) != name and shorter:
        name = shorter
    return name


def _size_of(image: dict[str, Any], annotations: list[tuple[int, Any]]) -> tuple[int, int] | None:
    """Return (width, height) of the picture that was annotated, if the image or the first of its masks says so."""
    masks = (annotation.get("segmentation") for _, annotation in annotations if isinstance(annotation, dict))
    sizes = (mask.get("size") for mask in masks if isinstance(mask, dict))
    said = [size[::-1] for size in itertools.islice(sizes, 1) if isinstance(size, list)]
    for size in ([image.get("width"), image.get("height")], *said):
        if len(size) == 2 and all(isinstance(side, int | float) and side >= 1 for side in size):
            return int(size[0]), int(size[1])
    return None


def _require_few_runs(annotations: list[tuple[int, Any]]) -> None:
    runs = 0
    for _, annotation in annotations:
        drawn = annotation.get("segmentation") if isinstance(annotation, dict) else None
        counts = drawn.get("counts") if isinstance(drawn, dict) else None
        runs += len(counts) if isinstance(counts, list | str) else 0
    if runs > 2 * MAX_RUNS:
        raise BadInput("bad_annotation", f"COCO with more than {MAX_RUNS} runs of masks: save them as polygons")


def _shapes(
    annotations: list[tuple[int, Any]], here: str, names: dict[str, str], size: tuple[int, int] | None
) -> Iterator[Shape]:
    for number, annotation in annotations:
        if not isinstance(annotation, dict):
            yield Shape(number, (), "no annotation of COCO")
            continue
        classes = class_names(names.get(str(annotation.get("category_id"))))
        if str(annotation.get("image_id", here)) != here:
            yield Shape(number, classes, "of an image that is not listed")
            continue
        try:
            yield Shape(number, classes, _drawn(annotation.get("segmentation"), size))
        except MALFORMED as error:
            yield Shape(number, classes, f"not a polygon: {shortened(error, 120)}")


def _drawn(segmentation: Any, size: tuple[int, int] | None) -> Polygon | GeometryCollection | str:
    if isinstance(segmentation, dict):
        counts, width, height = run_lengths(segmentation)
        if size is not None and size != (width, height):
            return f"a mask of {width} x {height} px, of an image of {size[0]} x {size[1]} px"
        parts = outlines(counts, height)
        return GeometryCollection(parts) if parts else "an empty mask"
    if not segmentation:
        return "only a bounding box"
    rings = segmentation if isinstance(segmentation[0], list) else [segmentation]
    polygons = [polygon_of(np.asarray(ring, np.float64).reshape(-1, 2)) for ring in rings]
    return polygons[0] if len(polygons) == 1 else GeometryCollection(polygons)
