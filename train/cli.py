"""RunConfig <-> YAML <-> command line, and what differs between two of them."""

from __future__ import annotations

import difflib
import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from train.config import RunConfig

EPILOG = "precedence: fields on the command line override --config, which overrides the defaults"


def make_parser(prog: str = "python -m train") -> ArgumentParser:
    """A parser with one option per field of RunConfig, `--config FILE` and `--print_config`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # Prefixes as abbreviations would let a typing error select another field.
    parser = ArgumentParser(prog=prog, epilog=EPILOG, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the fields below")
    parser.add_class_arguments(RunConfig, None)
    return parser


def parse(argv: list[str] | None = None) -> RunConfig:
    """The run's configuration from a command line (sys.argv where None).

    Raises:
        ValueError: an unknown field (with the nearest names), a value of the wrong type, an unreadable file.
    """
    parser = make_parser()
    try:
        return _instantiate(parser, parser.parse_args(argv))
    except SystemExit:  # --help and --print_config end here
        raise
    except Exception as error:
        raise ValueError(_explain(str(error))) from error


def load(path: str | Path) -> RunConfig:
    """The configuration in a YAML file, such as a run directory's config.yaml.

    Raises:
        ValueError: the file is missing, or holds an unknown field or a value of the wrong type.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--config: there is no file {path}")
    return parse(["--config", str(path)])


def to_yaml(config: RunConfig) -> str:
    """Every field with its value, as YAML that `load` reads back equal."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)


def differences(before: RunConfig, after: RunConfig) -> list[str]:
    """One line `field: before -> after` for every field of the experiment that differs; machine fields are left out."""
    a, b = flatten(before), flatten(after)
    ignore = machine_fields(RunConfig) | {"name"}
    changed = [key for key in sorted(a | b) if a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in changed if key not in ignore]


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"data.image_size": 224, ...} for every field of nested dataclasses."""
    flat: dict[str, Any] = {}
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            flat |= flatten(value, f"{prefix}{item.name}.")
        else:
            flat[prefix + item.name] = value
    return flat


def machine_fields(kind: type, prefix: str = "") -> set[str]:
    """Dotted names of the fields that may differ between a run and its resumption."""
    example = kind()
    names: set[str] = set()
    for item in fields(kind):
        if item.metadata.get("machine"):
            names.add(prefix + item.name)
        elif is_dataclass(value := getattr(example, item.name)):
            names |= machine_fields(type(value), f"{prefix}{item.name}.")
    return names


def _instantiate(parser: ArgumentParser, parsed: Namespace) -> RunConfig:
    built = parser.instantiate(parsed) if hasattr(parser, "instantiate") else parser.instantiate_classes(parsed)
    return RunConfig(**{item.name: getattr(built, item.name) for item in fields(RunConfig)})


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _explain(message: str) -> str:
    """jsonargparse's message on one line, with the nearest field names where one is unknown."""
    message = " ".join(message.split())
    known = [f"--{name}" for name in flatten(RunConfig())]
    if found := re.search(r"unrecognized arguments: (--[\w.]+)", message):
        unknown = found[1]
        message = f"there is no field {unknown}"
    elif found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        unknown = f"--{found[1]}.{found[2]}"
        message = f"there is no field {unknown}"
    else:
        return re.sub(r'Parser key "([\w.]+)":', r"--\1:", message).replace("<class '", "").replace("'>", "")
    leaf = unknown.rpartition(".")[2].lstrip("-")
    near = difflib.get_close_matches(unknown, known, n=3) or [n for n in known if n.rpartition(".")[2] == leaf]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"{message}{hint} (python -m train --help lists every field)"
