"""The command line of every script in `pipelines/`, and the order in which settings override each other.

Command line > `--config` > `configs/synthetic.yaml` (only without `--data`) > defaults. A bad key or value ends in one
readable line that names the key and exit status 2, before anything starts.
"""

from __future__ import annotations

import argparse
import os
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from apacs_ray.config.section import COMMON, Section
from apacs_ray.config.settings import Settings
from apacs_ray.config.sweep import require_sweep
from apacs_ray.config.training_settings import TrainingSettings
from apacs_ray.config.yaml import find_config, read_yaml
from apacs_ray.errors import UsageError
from apacs_ray.redact import uri_defect

SYNTHETIC_CONFIG = "configs/synthetic.yaml"
SECTIONS: dict[str, type[Section]] = {
    name: field.annotation for name, field in Settings.model_fields.items() if isinstance(field.annotation, type)
}


@dataclass(frozen=True)
class Command:
    """One parsed command: where the data is (None: synthetic smears), where the run goes, and its settings."""

    data: str | None
    output: str
    settings: Settings
    dry_run: bool = False
    estimate: bool = False


@dataclass(frozen=True)
class SegmentCommand:
    """One parsed `segment`: the trained networks, the slides, where results go, and the settings."""

    model: str
    slides: tuple[str, ...]
    output: str
    settings: Settings
    dry_run: bool = False
    estimate: bool = False


def parse_segment(argv: Sequence[str], program: str, summary: str, *, looks: bool = True) -> SegmentCommand:
    """Return the command in `argv`, as `parse` does.

    Args:
        argv: The command line without the program.
        program: Its name, for `--help`.
        summary: What it does, for `--help`.
        looks: Whether it has `--dry-run` and `--estimate`.

    Returns:
        The command, its settings merged from all layers and validated.

    Raises:
        UsageError: An option or a file of settings is not possible; in one line that names it.
    """
    usage = "%(prog)s --model URI --slides URI [URI ...] --output URI [--config FILE.yaml] [--SECTION.KEY VALUE ...]"
    parser = _bare_parser(program, summary, usage)
    parser.add_argument("--model", required=True, metavar="URI", help="a finished run, or a folder with its models")
    parser.add_argument(
        "--slides", required=True, nargs="+", metavar="URI", help="folders of slides, or single ones; local or s3://"
    )
    parser.add_argument("--output", required=True, metavar="URI", help="a folder for each slide is made there")
    if looks:
        parser.add_argument(
            "--dry-run",
            action="store_true",
            help="only open every slide and say what would be done: rejects, cores, what runs where; no network runs",
        )
        parser.add_argument(
            "--estimate",
            action="store_true",
            help="only say what it will take on this cluster: cores, FLOPs, bytes, hours, from a short measured sample",
        )
    _add_settings(parser, ("segment", "data"), everything="--help-all" in argv)
    given = vars(parser.parse_args(argv))
    model, slides, output, config = (given.pop(name) for name in ("model", "slides", "output", "config"))
    dry_run, estimate = _looks(given)
    for option, uri in (("--model", model), ("--output", output), *(("--slides", uri) for uri in slides)):
        _require_open(option, uri)
    return SegmentCommand(model, tuple(slides), output, _settings_of(given, config), dry_run, estimate)


def parse(argv: Sequence[str], program: str, summary: str, sections: Collection[str] = tuple(SECTIONS)) -> Command:
    """Return the command in `argv`. `--help` and unknown options end the process as argparse does.

    Every program takes every setting: those of earlier stages tell it which of their results it may go on from.

    Args:
        argv: The command line without the program.
        program: Its name, for `--help`.
        summary: What it does, for `--help`.
        sections: Those that its own stages read; `--help` shows what is common in them.

    Returns:
        The command, its settings merged from all layers and validated.

    Raises:
        UsageError: An option or a file of settings is not possible; in one line that names it.
    """
    given = vars(_parser(program, summary, sections, everything="--help-all" in argv).parse_args(argv))
    data, output, config = given.pop("data"), given.pop("output"), given.pop("config")
    dry_run, estimate = _looks(given)
    for option, uri in (("--data", data), ("--output", output)):
        _require_open(option, uri)
    settings = _settings_of(given, config, synthetic=data is None)
    require_sweep(settings)
    return Command(data, output or default_output(data), settings, dry_run, estimate)


def _looks(given: dict[str, Any]) -> tuple[bool, bool]:
    """Take `--dry-run` and `--estimate` out of what was given, where a program has them."""
    dry_run, estimate = given.pop("dry_run", False), given.pop("estimate", False)
    if dry_run and estimate:
        raise UsageError("--dry-run and --estimate: give one of them")
    return dry_run, estimate


def _settings_of(given: dict[str, Any], config: str | None, *, synthetic: bool = False) -> Settings:
    """The settings on a command line, over those of `--config`, over those of synthetic smears."""
    layers: list[tuple[str, dict[str, Any]]] = []
    if synthetic:
        layers.append((SYNTHETIC_CONFIG, read_yaml(find_config(SYNTHETIC_CONFIG))))
    if config is not None:
        layers.append((config, read_yaml(find_config(config))))
    layers.append(("command line", _nested({key: value for key, value in given.items() if value is not None})))
    settings = merge_settings(layers)
    for section, tree in settings.model_dump().items():
        for key, value in tree.items():
            _require_open(f"{section}.{key}", value)
    return settings


def _require_open(key: str, value: Any) -> None:
    """Raise UsageError for a URI with a secret in it: what is given here is printed and kept."""
    if value == "":
        raise UsageError(f"{key}: empty; leave it out, or say what it is to be")
    if isinstance(value, str) and (defect := uri_defect(value)) is not None:
        raise UsageError(f"{key}: {defect}")


def default_output(data: str | None) -> str:
    """Return `runs/<name of the data>`, so that the same command finds its own run again."""
    if data is None:
        return "runs/synthetic"
    name = os.path.basename(os.path.abspath(data)) if "://" not in data else data.rstrip("/").rsplit("/", 1)[-1]
    return f"runs/{'data' if name in ('', '.', '..') else name}"


def merge_settings(layers: Sequence[tuple[str, dict[str, Any]]]) -> Settings:
    """Return the settings in layers, of which the later ones win.

    Args:
        layers: (source, tree), the source as an error names it.

    Returns:
        The settings, validated.

    Raises:
        UsageError: A key or a value is not possible; names the key and the source it is in.
    """
    merged: dict[str, Any] = {}
    for _, tree in layers:
        _merge(merged, tree)
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        raise UsageError(_one_line(error, layers)) from error


def _parser(program: str, summary: str, sections: Collection[str], *, everything: bool) -> argparse.ArgumentParser:
    """The options of every program; its help shows those of `sections` that are common, or everything."""
    usage = "%(prog)s [--data URI] [--output URI] [--config FILE.yaml] [--SECTION.KEY VALUE ...]"
    parser = _bare_parser(program, summary, usage)
    parser.add_argument(
        "--data",
        metavar="URI",
        help="local path or s3://bucket/prefix (default: synthetic smears, made on the spot)",
    )
    parser.add_argument("--output", metavar="URI", help="the run (default: runs/<name of the data, or synthetic>)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only plan the tiles: manifests and a picture of each slide, and what cutting them will cost",
    )
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="only say what each stage will take on this cluster: tiles, bytes, hours, from a short measured sample",
    )
    _add_settings(parser, sections, everything=everything)
    return parser


def _bare_parser(program: str, summary: str, usage: str) -> argparse.ArgumentParser:
    """A program without options but those of every one."""
    parser = argparse.ArgumentParser(
        prog=program,
        usage=usage,
        description=summary,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="The same command again resumes a run. Exit status: 0 done, 1 a stage failed, 2 wrong usage.\n"
        "Every script takes every setting; --help-all shows them.",
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="settings, looked up here, then in the repository")
    parser.add_argument("--help-all", action="help", help="show every setting and exit")
    return parser


def _add_settings(parser: argparse.ArgumentParser, sections: Collection[str], *, everything: bool) -> None:
    """Add every setting; help shows those of `sections` that are common, or everything."""
    for section, model in SECTIONS.items():
        fields = model.model_fields
        shown = {name for name in fields if everything or (section in sections and COMMON in fields[name].metadata)}
        summary_line = (model.__doc__ or "").strip().splitlines()[0]
        group = parser.add_argument_group(section, summary_line) if shown else parser
        for name, field in fields.items():
            text = _help(section, name, field) if name in shown else argparse.SUPPRESS
            group.add_argument(f"--{section}.{name}", metavar=_metavar(field), help=text)


def _help(section: str, name: str, field: FieldInfo) -> str:
    text = field.description or ""
    if "(default:" not in text:
        text += f" (default: {f'members.{name}' if _inherits(section, name) else _shown(field.default)})"
    return text.replace("%", "%%")


def _inherits(section: str, name: str) -> bool:
    """Whether a setting that is not given has the members' value."""
    return section == "fusion" and name in TrainingSettings.model_fields


def _shown(default: Any) -> str:
    match default:
        case None:
            return "none"
        case bool():
            return str(default).lower()
        case tuple():
            return ",".join(default)
        case _:
            return str(default)


def _metavar(field: FieldInfo) -> str:
    kinds = [kind for kind in (typing.get_args(field.annotation) or (field.annotation,)) if kind is not type(None)]
    if all(isinstance(kind, str) for kind in kinds):
        return "|".join(kinds)
    names = {bool: "true|false", int: "N", float: "X", str: "TEXT"}
    return names.get(kinds[0], "A,B,...")


def _nested(flat: dict[str, str]) -> dict[str, Any]:
    """{"tiles.size": "256"} as {"tiles": {"size": "256"}}; lists are comma-separated, `none` unsets."""
    tree: dict[str, Any] = {}
    for key, text in flat.items():
        section, name = key.split(".")
        annotation = SECTIONS[section].model_fields[name].annotation
        may_be_none = type(None) in typing.get_args(annotation) or _inherits(section, name)
        value: Any = text
        if typing.get_origin(annotation) is tuple:
            value = [part.strip() for part in text.split(",")]
        elif text.lower() in ("none", "null") and may_be_none:
            value = None
        tree.setdefault(section, {})[name] = value
    return tree


def _merge(into: dict[str, Any], tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, dict) else value


def _one_line(error: ValidationError, layers: Sequence[tuple[str, dict[str, Any]]]) -> str:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    source = next((name for name, tree in reversed(layers) if _holds(tree, path)), layers[-1][0])
    key = ".".join(path[:2]) or "settings"
    if first["type"] == "extra_forbidden":
        known = Settings.model_fields if len(path) == 1 else SECTIONS[path[0]].model_fields
        return f"{key}: no such setting (in {source}); there is {', '.join(known)}"
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict | BaseModel) else f", not {first['input']!r}"
    return f"{key}: {message}{given} (in {source})"


def _holds(tree: Any, path: Sequence[str]) -> bool:
    for part in path[:2]:
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True
