"""The command `apacs-ray`, also `python -m apacs_ray`: every script of `pipelines/`, and `doctor`."""

from __future__ import annotations

import sys

USAGE = """usage: apacs-ray COMMAND [options]; apacs-ray COMMAND --help shows its options

  full           the whole pipeline, from the data to the report
  ingest         cut images or slides into tile shards
  train-members  train FCN-32, FCN-16 and FCN-8
  tune-fusion    store the members' heatmaps and sweep the fusion's hyperparameters
  train-fusion   train the fusion network
  evaluate       evaluate all models on the test tiles and write the report
  segment        segment whole slides by a trained ensemble: masks and objects
  export         write the trained ensemble of a run as one ONNX file
  doctor         say whether a run would work here

python pipelines/NAME.py does the same as apacs-ray NAME."""
STAGES = ("full", "ingest", "train-members", "tune-fusion", "train-fusion", "evaluate")


def main() -> int:
    """Run the command that the first argument names.

    Returns:
        The exit status of what is no command: 0 after help, 2 for wrong usage. A command ends the process itself.
    """
    name, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if sys.version_info < (3, 11):  # what follows does not even parse there  # noqa: UP036
        print("failed: Python 3.11 or newer is needed, this is", sys.version.split()[0], file=sys.stderr)
        return 1
    try:
        if name in STAGES:
            from apacs_ray.commands.pipeline import main as run_script

            run_script(f"{name.replace('-', '_')}.py", arguments)
        if name == "export":
            from apacs_ray.commands.export import main as export

            export(arguments)
        if name == "segment":
            from apacs_ray.commands.segment import main as segment

            segment(arguments)
        if name == "doctor":
            from apacs_ray.commands.doctor import main as doctor

            doctor(arguments)
    except ImportError as error:
        print(f"failed: {error}; install the package with its dependencies: pip install .", file=sys.stderr)
        return 1
    print(f"error: {f'no command {name!r}' if name else 'no command given'}\n{USAGE}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
