"""The public API: the names below, imported when they are first used, so that `import apacs_ray` needs no torch.

Everything else may move between versions; what a run leaves behind is described in `docs/outputs.md`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apacs_ray.commands.segment import segment
    from apacs_ray.config.settings import Settings
    from apacs_ray.inference.predictor import Predictor, load_ensemble
    from apacs_ray.slides.open import open_slide
    from apacs_ray.storage import open_store

__version__ = "0.1.0"
__all__ = ["Predictor", "Settings", "__version__", "load_ensemble", "open_slide", "open_store", "segment"]

_HOME = {
    "Predictor": "apacs_ray.inference.predictor",
    "Settings": "apacs_ray.config.settings",
    "load_ensemble": "apacs_ray.inference.predictor",
    "open_slide": "apacs_ray.slides.open",
    "open_store": "apacs_ray.storage",
    "segment": "apacs_ray.commands.segment",
}


def __getattr__(name: str) -> object:
    """Return a public name from the module that defines it.

    Raises:
        AttributeError: There is no such public name.
    """
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
