"""Store the members' heatmaps and sweep the fusion's hyperparameters."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apacs_ray.commands.pipeline import main

if __name__ == "__main__":
    main("tune_fusion.py")
