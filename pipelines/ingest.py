"""Cut images and masks into tile shards."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apacs_ray.commands.stages import main

if __name__ == "__main__":
    main("ingest.py", "Cut images and masks into tile shards.", ("ingest",))
