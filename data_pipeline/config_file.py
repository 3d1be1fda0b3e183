"""A YAML file of fields: `--config` of every command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


class _UniqueKeys(yaml.SafeLoader):
    """Of a key that is there twice, YAML keeps the last one and drops the other without a word."""

    def construct_mapping(self, node, deep=False):
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(f"{key.value} is there twice, in line {lines[key.value]} and in line {line}")
            lines[key.value] = line
        return super().construct_mapping(node, deep)


def read_fields(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ValueError: naming the file, which cannot be read, is no YAML, has a key twice, or holds no mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _UniqueKeys)
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"--config {path}: no YAML{line}: {error.problem}") from None
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: it has no fields; write them as --print_config of `python -m train` does")
    return content


def instantiate(parser: ArgumentParser, parsed: Namespace) -> Any:
    """What was parsed, with its dataclasses; jsonargparse has renamed the method."""
    return parser.instantiate(parsed) if hasattr(parser, "instantiate") else parser.instantiate_classes(parsed)
