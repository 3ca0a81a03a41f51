"""Write the trained ensemble of a run as one ONNX file."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from apacs_ray.errors import ApacsError
from apacs_ray.redact import redact


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, metavar="URI", help="the --output of a finished run")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.onnx")
    parser.add_argument("--height", type=int, default=2000, help="px of the images (default: 2000)")
    parser.add_argument("--width", type=int, default=2000, help="px of the images (default: 2000)")
    arguments = parser.parse_args()
    from apacs_ray.console import print_log
    from apacs_ray.inference.predictor import load_ensemble
    from apacs_ray.models.onnx import export_onnx
    from apacs_ray.models.spec import MEMBERS
    from apacs_ray.storage import open_store

    folders = {name: f"members/{name}" for name in MEMBERS} | {"fusion": "fusion"}
    print_log()
    try:
        ensemble = load_ensemble(open_store(arguments.model), folders)
        export_onnx(ensemble, arguments.output, height=arguments.height, width=arguments.width)
    except FileNotFoundError as error:
        sys.exit(f"error: {arguments.model}: no finished run ({error.filename or error} is missing)")
    except (ApacsError, OSError) as error:
        sys.exit(f"error: {redact(str(error))}")
    print(f"{arguments.output}: image (N, 3, {arguments.height}, {arguments.width}) in 0..1 -> logits of cell")


if __name__ == "__main__":
    main()
