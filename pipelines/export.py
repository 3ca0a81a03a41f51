"""Write the trained ensemble of a run as one ONNX file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apacs_ray.commands.export import main

if __name__ == "__main__":
    main()
