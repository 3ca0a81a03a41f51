"""Store the members' heatmaps and sweep the fusion's hyperparameters."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apacs_ray.commands.stages import main

if __name__ == "__main__":
    main(
        "tune_fusion.py",
        "Store the members' heatmaps and sweep the fusion's hyperparameters.",
        ("heatmaps", "tune_fusion"),
    )
