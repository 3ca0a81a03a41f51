"""Synthetic smears as files in the data set's layout."""

from __future__ import annotations

from apacs_ray.data.images import encode_image, encode_mask
from apacs_ray.data.synthetic import SlideSpec, render
from apacs_ray.storage import Store


def write_slide(store: Store, spec: SlideSpec) -> None:
    """Render a slide as `<Part>_Input/<id>.jpg` (JPEG q90, so with JPEG's noise) and its exact mask as 1-bit PNG.

    Files that are there already are complete (writes are atomic) and deterministic, so they are kept.
    """
    part = spec.split.capitalize()
    image, mask = (
        f"Synthetic_{part}_Input/{spec.slide_id}.jpg",
        f"Synthetic_{part}_GroundTruth/{spec.slide_id}.png",
    )
    if store.version(image) is not None and store.version(mask) is not None:
        return
    rgb, cells = render(spec)
    store.write(image, encode_image(rgb, "jpeg", 90, "4:2:0"))
    store.write(mask, encode_mask(cells))
