"""What we set in Ray is still Ray's to be set: names of its own that a later version may change without a word."""

from __future__ import annotations

import os
import subprocess
import sys

LOOK = """
from apacs_ray.distributed.session import configure_data, prepare_ray
prepare_ray()
from ray.data._internal.execution.metadata_fetcher import make_metadata_fetcher
from ray.data._internal.execution.resource_manager import ResourceManager
before = ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S
configure_data()
print(before, ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S, type(make_metadata_fetcher()).__name__)
"""


def test_ray_data_asks_for_resources_soon_and_fetches_metadata_at_once() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    said = subprocess.run([sys.executable, "-c", LOOK], env=clean, capture_output=True, text=True, check=True)
    before, after, fetcher = said.stdout.split()
    assert float(after) < float(before)
    assert fetcher == "InlineMetadataFetcher"
