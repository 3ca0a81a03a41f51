"""Checks of Python and of the packages that `pyproject.toml` asks for."""

from __future__ import annotations

import importlib.metadata
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

from apacs_ray.doctor.finding import Finding
from apacs_ray.runs.provenance import ROOT

OLDEST_PYTHON = (3, 11)
INSTALL = "pip install . (in the environment that is to run it)"


def check_python() -> Iterator[Finding]:
    """Check that this Python is new enough."""
    version = ".".join(str(part) for part in sys.version_info[:3])
    if sys.version_info[:2] < OLDEST_PYTHON:
        yield Finding("Python", "failed", f"{version} is too old", "use Python 3.11 or newer")
    else:
        yield Finding("Python", "ok", f"{version} ({sys.executable})")


def requirements(root: Path = ROOT) -> list[str]:
    """Read the package's dependencies from the checkout, else from the installed distribution.

    Args:
        root: Of the checkout.

    Returns:
        Requirements such as `numpy>=2.0`.

    Raises:
        PackageNotFoundError: There is neither, as in a copy of the folder `apacs_ray` alone.
    """
    project = root / "pyproject.toml"
    if project.is_file():
        return list(tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"])
    return list(importlib.metadata.requires("apacs_ray") or ())


def check_packages(wanted: Sequence[str] | None = None) -> Iterator[Finding]:
    """Check that every dependency, with those of its extras, is installed in the range that is asked for."""
    try:
        wanted = requirements() if wanted is None else wanted
    except importlib.metadata.PackageNotFoundError:
        message = f"apacs_ray is not installed and there is no {ROOT / 'pyproject.toml'}: what it needs is not known"
        yield Finding("packages", "warning", message, "copy pyproject.toml beside the folder apacs_ray")
        return
    wrong = [problem for text in wanted for problem in _problems(text)]
    for problem in wrong:
        yield Finding("packages", "failed", problem, INSTALL)
    if not wrong:
        yield Finding("packages", "ok", f"{len(wanted)} dependencies are installed, all in range")


def _problems(text: str, extra: str = "", asker: str = "") -> Iterator[str]:
    from packaging.requirements import Requirement

    requirement = Requirement(text)
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
        return
    by = f" (for {asker})" if asker else ""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        yield f"{requirement.name} is not installed{by}"
        return
    if not requirement.specifier.contains(version, prereleases=True):
        yield f"{requirement.name} {version} is installed, {requirement.specifier} is wanted{by}"
    if asker:
        return
    for name in sorted(requirement.extras):
        for further in importlib.metadata.requires(requirement.name) or ():
            if "extra" in further:
                yield from _problems(further, name, f"{requirement.name}[{name}]")


def check_torch() -> Iterator[Finding]:
    """Check that torch and torchvision were built for each other: else an import or an operator fails."""
    import torch

    try:
        import torchvision

        torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
    except (ImportError, RuntimeError, AttributeError) as error:
        message = f"torch {torch.__version__} and torchvision do not fit: {' '.join(str(error).split())}"
        yield Finding("torch", "failed", message, "install both together: pip install --upgrade torch torchvision")
        return
    yield Finding("torch", "ok", f"torch {torch.__version__} and torchvision {torchvision.__version__} work together")
