"""YAML files of settings and sweeps: where they are looked up, and how they are read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml

from apacs_ray.errors import UsageError

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALLED = Path(sys.prefix) / "share" / "apacs_ray"  # where `pip install` puts configs/ and tune_configs/
LARGEST_YAML = 1 << 20  # bytes


def find_config(name: str) -> Path:
    """Find a YAML file.

    Args:
        name: Its path from the working directory, else from the repository, else from where the package is installed.

    Returns:
        The path of the file that is there.

    Raises:
        UsageError: It is in none of them.
    """
    for candidate in (Path(name), REPOSITORY / name, INSTALLED / name):
        if candidate.is_file():
            return candidate
    raise UsageError(f"{name}: no such file here or in {REPOSITORY}")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file.

    Returns:
        Its keys and plain values; nothing for an empty file.

    Raises:
        UsageError: The file cannot be read, is too large, or holds no mapping of plain values; in one line with the
            file's name and the line in it.
    """
    try:
        if path.stat().st_size > LARGEST_YAML:
            raise UsageError(f"{path}: {path.stat().st_size} bytes; settings have at most {LARGEST_YAML}")
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected 'key: value' lines, found a {type(content).__name__}")
    return content


def parse_yaml(text: str) -> Any:
    """Read YAML of plain values, without aliases: a few lines of them may stand for gigabytes.

    Returns:
        Dicts, lists, strings, numbers, booleans, dates and None.

    Raises:
        yaml.YAMLError: `text` is not YAML, has an alias or another type of value, or gives a key twice.
    """
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken):
            raise yaml.YAMLError(f"line {token.start_mark.line + 1}: an alias (*{token.value}); write its value out")
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which by itself lets the last of equal keys win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value} is given twice")
                keys.add(key.value)
        return super().construct_mapping(node, deep)
