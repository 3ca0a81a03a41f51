"""The command `export`: the trained ensemble of a run as one ONNX file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from apacs_ray.commands.shell import run_command
from apacs_ray.errors import ApacsError

SUMMARY = "Write the trained ensemble of a run as one ONNX file."


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command, and end the process with its exit status."""
    run_command(partial(_work, sys.argv[1:] if argv is None else argv))


def _work(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="export.py", description=SUMMARY)
    parser.add_argument("--model", required=True, metavar="URI", help="the --output of a finished run")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.onnx")
    parser.add_argument("--height", type=int, default=2000, help="px of the images (default: 2000)")
    parser.add_argument("--width", type=int, default=2000, help="px of the images (default: 2000)")
    arguments = parser.parse_args(argv)
    from apacs_ray.console import print_log
    from apacs_ray.inference.predictor import load_ensemble
    from apacs_ray.models.onnx import export_onnx
    from apacs_ray.models.registry import MEMBERS
    from apacs_ray.storage import open_store

    print_log()
    folders = {name: f"members/{name}" for name in MEMBERS} | {"fusion": "fusion"}
    try:
        ensemble = load_ensemble(open_store(arguments.model), folders)
        export_onnx(ensemble, arguments.output, height=arguments.height, width=arguments.width)
    except FileNotFoundError as error:
        raise ApacsError(f"{arguments.model}: no finished run ({error.filename or error} is missing)") from error
    except OSError as error:
        raise ApacsError(f"{arguments.output}: cannot be written ({error})") from error
    print(f"{arguments.output}: image (N, 3, {arguments.height}, {arguments.width}) in 0..1 -> logits of cell")
    return 0
