"""The whole pipeline: data, members, heatmaps, sweep, fusion, evaluation, report."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apacs_ray.commands.pipeline import main

if __name__ == "__main__":
    main("full.py")
