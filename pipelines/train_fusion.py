"""Train the fusion network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apacs_ray.commands.pipeline import main

if __name__ == "__main__":
    main("train_fusion.py")
