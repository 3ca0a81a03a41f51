"""Train the fusion network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apacs_ray.commands.stages import main

if __name__ == "__main__":
    main("train_fusion.py", "Train the fusion network.", ("train_fusion",))
