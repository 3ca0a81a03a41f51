"""Annotations as QuPath writes them, and the slide that they are of."""

from __future__ import annotations

import json
from typing import Any

from apacs_ray.data.grid import Box
from apacs_ray.slides.reader import Level, SlideInfo

INFO = SlideInfo("test", (Level(300, 200, 1.0),), 0.25, Box(40, 20, 200, 150))


def polygon(*rings: list[list[float]]) -> dict[str, Any]:
    """A feature of these rings, which are closed here."""
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]] for ring in rings]}}


def collection(*features: Any) -> bytes:
    """A file with these features."""
    return json.dumps({"type": "FeatureCollection", "features": features}).encode()
