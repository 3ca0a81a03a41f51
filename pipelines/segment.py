"""Segment whole slides by a trained ensemble: masks and objects that QuPath opens."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apacs_ray.commands.segment import main

if __name__ == "__main__":
    main()
