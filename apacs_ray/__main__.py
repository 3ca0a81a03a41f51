"""`python -m apacs_ray doctor`: whether a run would work here."""

from __future__ import annotations

import os
import sys

USAGE = "usage: python -m apacs_ray doctor [--data URI] [--output URI] [--config FILE.yaml] [--SECTION.KEY VALUE ...]"


def main() -> int:
    """Exit status: 0 a run would work, 1 it would not, 2 wrong usage."""
    arguments = sys.argv[1:]
    if arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if arguments[:1] != ["doctor"]:
        print(USAGE, file=sys.stderr)
        return 2
    if sys.version_info < (3, 11):  # what follows does not even parse there  # noqa: UP036
        print("failed: Python 3.11 or newer is needed, this is", sys.version.split()[0], file=sys.stderr)
        return 1
    try:
        from apacs_ray.commands.doctor import doctor
        from apacs_ray.errors import UsageError
    except ImportError as error:
        print(f"failed: {error}; install the package with its dependencies: pip install .", file=sys.stderr)
        return 1
    try:
        return doctor(arguments[1:])
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    sys.stdout.flush()
    sys.stderr.flush()
    # a check that hung is left behind in its thread: do not wait for it
    os._exit(status)
