"""RunConfig <-> YAML <-> command line, what differs between two of them, and how a command ends."""

from __future__ import annotations

import argparse
import difflib
import functools
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import Field, asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace, set_parsing_settings

from data_pipeline.config import Source
from data_pipeline.config_file import instantiate, read_fields
from data_pipeline.storage.redaction import redact_urls
from train.config import EvalTask, RunConfig

EPILOG = (
    "precedence: fields on the command line override --config, wherever it is, which overrides the defaults; "
    "of several --config, and of a field given twice, a later one overrides the one before. --from RUN and "
    "--from-weights RUN start from another run, whose fields are then the defaults (--step S: from its checkpoint of "
    "step S, or best). --profile FIRST:LAST profiles these steps"
)
SHORT = {"--from": ["--parent.run"], "--from-weights": ["--parent.take", "weights", "--parent.run"]}
SHORT |= {"--step": ["--parent.step"], "--profile": ["--tracking.profile"]}
"""Options that stand for fields."""
EXAMPLE_TASKS = '[{"name": "birds", "task": "zeroshot", "data": "data/birds"}]'


class ConfigFile(ActionConfigFile):
    """--config: refuses what jsonargparse would take in silence, or not name, and leaves the rest to it."""

    def __call__(self, parser, cfg, values, option_string=None):
        _check_section(read_fields(values), f"--config {values}: ", "")
        super().__call__(parser, cfg, values, option_string)


@functools.cache
def make_parser() -> ArgumentParser:
    """A parser with one option per field of RunConfig, `--config FILE` and `--print_config`."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # Prefixes as abbreviations would let a typing error select another field.
    parser = ArgumentParser(prog="python -m train", epilog=EPILOG, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ConfigFile, help="YAML file with any of the fields below")
    parser.add_class_arguments(RunConfig, None)
    return parser


def parse(argv: list[str] | None = None) -> RunConfig:
    """The run's configuration from a command line (sys.argv where None).

    Raises:
        ValueError: an unknown field (with the nearest names), a value of the wrong type, an unreadable file.
    """
    parser = make_parser()
    try:
        given = _files_first(_in_full(sys.argv[1:] if argv is None else argv))
        config = expanded(_instantiate(parser, parser.parse_args([*_of_parent(parser, given), *given])))
    except SystemExit:  # --help and --print_config end here
        raise
    except Exception as error:
        raise ValueError(_explain(str(error))) from error
    _check_values(config)
    return config


def _files_first(argv: Sequence[str]) -> list[str]:
    """The arguments with every --config before all fields: jsonargparse lets the later one of two win."""
    files: list[str] = []
    rest: list[str] = []
    remaining = iter(argv)
    for argument in remaining:
        if argument == "--config":
            files += [argument, *itertools.islice(remaining, 1)]
        else:
            (files if argument.startswith("--config=") else rest).append(argument)
    return files + rest


def _in_full(argv: Sequence[str]) -> list[str]:
    """The arguments with fields for the options of SHORT."""
    full: list[str] = []
    for argument, following in itertools.zip_longest(argv, argv[1:], fillvalue="--"):
        name, equals, value = argument.partition("=")
        if name.startswith("--from") and name in SHORT and not (value if equals else following):
            raise ValueError(f"{name} is empty: give a run, or leave it out to start afresh")
        full += SHORT.get(name, [name])
        full[-1] += equals + value
    return full


def _of_parent(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Arguments for the fields of the run that the command line starts from, which come before all others.

    Where that run is gone, they are those of the run that has started from it.

    Raises:
        ValueError: it is no run.
    """
    named = [value for name, value in zip(_split(argv), _split(argv)[1:], strict=False) if name == "--parent.run"]
    if not named or not named[-1]:
        return []
    path = Path(named[-1]).expanduser() / "config.yaml"
    if not path.is_file():
        config = _instantiate(parser, parser.parse_args(list(argv)))
        beside = [Path(config.runs_dir), path.parent.parent]  # where its runs_dir may have been taken from its parent
        children = [one / config.name / "config.yaml" for one in beside]
        path = next((one for one in children if one.is_file() and load(one).parent.run), path)
    if not path.is_file():
        raise ValueError(f"parent.run {named[-1]}: there is no run in it ({path} is not there)")
    return ["--config", str(path), "--parent.step", "", "--parent.take", "all"]


def _split(argv: Sequence[str]) -> list[str]:
    """The arguments with --name=value as two."""
    return [part for argument in argv for part in (argument.split("=", 1) if argument[:2] == "--" else [argument])]


def expanded(value: Any) -> Any:
    """A configuration, or the options of a command, with the home directory for the ~ that a path begins with."""
    if isinstance(value, argparse.Namespace):
        return argparse.Namespace(**{name: expanded(item) for name, item in vars(value).items()})
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{item.name: expanded(getattr(value, item.name)) for item in fields(value)})
    if isinstance(value, (list, tuple)):
        return type(value)(expanded(item) for item in value)
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~") else value  # noqa: PTH111


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
    """Every field with its value, as YAML that `load` reads back equal, but for passwords and queries of urls: what a
    run keeps of its configuration, in its directory and its checkpoints, may be shown."""
    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)


def differences(before: RunConfig, after: RunConfig) -> list[str]:
    """One line `field: before -> after` for every field of the experiment that differs; machine fields are left out."""
    a, b = ({name: _plain(value) for name, value in flatten(config).items()} for config in (before, after))
    ignore = {name for name, field in _described(RunConfig).items() if field.metadata.get("machine")} | {"name"}
    changed = [key for key in sorted(a | b) if a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key)!r} -> {b.get(key)!r}" for key in changed if key not in ignore]


def exit_status(
    command: Callable[[], int | None],
    options: Iterable[str] = (),
    mistakes: type[Exception] | tuple[type[Exception], ...] = ValueError,
) -> int:
    """Run a command: what it returns, or 0; 2 where it ends by one of `mistakes`, the user's, which is said in flags.

    Environment: DUET_DEBUG, where it is set such an error is raised, with its traceback.
    """
    try:
        return command() or 0
    except mistakes as error:
        if os.environ.get("DUET_DEBUG"):
            raise
        print(f"error: {with_flags(str(error), options)}", file=sys.stderr)
        return 2


@contextmanager
def stdout_kept() -> Iterator[None]:
    """Sends to stderr what libraries write to stdout inside, also from C: only the result goes there."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def with_flags(message: str, options: Iterable[str] = ()) -> str:
    """The message of a library function, which speaks of arguments and fields, in the words of a command line.

    A field such as optim.lr becomes --optim.lr wherever it is. These become flags where the message starts with them
    or has them in backticks: an argument such as `global_batch`, which is the last part of one field alone; a field
    without a dot, such as `name`; one of a command's own `options`. Other words are left as they are, except
    passwords and signatures in urls.
    """
    message = redact_urls(message)
    names = list(flatten(RunConfig()))
    leaves = Counter(name.rpartition(".")[2] for name in names)
    # Without an underscore it may be a word of the sentence.
    flags = {leaf: f"--{name}" for name in names if leaves[leaf := name.rpartition(".")[2]] == 1 and "_" in leaf}
    flags |= {name: f"--{name}" for name in [*options, *(name for name in names if "." not in name)]}
    fields = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True) if "." in name)
    message = re.sub(rf"`?(?<![\w./-])({fields})(?![\w/]|\.\w)`?", r"--\1", message)
    message = message.replace("--parent.take weights, --parent.run", "--from-weights")
    for short, full in SHORT.items():
        message = re.sub(rf"{re.escape(' '.join(full[:2]))}(?!\w)", short, message)
    message = re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[0]), message)
    return re.sub(r"^\w+", lambda found: flags.get(found[0], found[0]), message)


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


def _described(kind: type, prefix: str = "") -> dict[str, Field]:
    """{"data.image_size": its type, default and metadata, ...} for every field of nested dataclasses."""
    example = kind()
    flat: dict[str, Field] = {}
    for item in fields(kind):
        if is_dataclass(value := getattr(example, item.name)):
            flat |= _described(type(value), f"{prefix}{item.name}.")
        else:
            flat[prefix + item.name] = item
    return flat


def _check_section(content: dict, where: str, prefix: str) -> None:
    known = flatten(RunConfig())
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in known:
            continue
        inside = [field for field in known if field.startswith(f"{name}.")]
        if not inside:
            raise ValueError(where + _unknown(f"--{name}"))
        if not isinstance(value, dict):
            raise ValueError(where + _no_section(name, inside))
        _check_section(value, where, f"{name}.")


def _check_values(config: RunConfig) -> None:
    """Raises ValueError for what jsonargparse lets through: null for any field, a string in place of a list."""
    known, defaults = _described(RunConfig), flatten(RunConfig())
    for name, value in flatten(config).items():
        if value is None and "None" not in str(known[name].type):
            raise ValueError(f"--{name} is null: give a value, or leave it out for {defaults[name]!r}")
    sources = config.data.train if isinstance(config.data.train, list) else [Source(config.data.train)]
    if any(not isinstance(source.data, str) or source.data.startswith("[") for source in sources):
        raise ValueError(
            f"--data.train {config.data.train}: several sources are a list such as "
            '[{"data": "a/manifest.json", "weight": 2}, {"data": "b/manifest.json"}]'
        )


def _instantiate(parser: ArgumentParser, parsed: Namespace) -> RunConfig:
    built = instantiate(parser, parsed)
    return RunConfig(**{item.name: getattr(built, item.name) for item in fields(RunConfig)})


def _plain(value: Any) -> Any:
    """Tuples as lists, since YAML has no tuples; urls without passwords and queries."""
    if isinstance(value, str):
        return redact_urls(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _explain(message: str) -> str:
    """jsonargparse's message on one line, in words, with the nearest field names where one is unknown."""
    message = " ".join(message.split())
    if found := re.search(r"unrecognized arguments: (--[\w.-]+)", message):
        return _unknown(found[1])
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        return _unknown(f"--{found[1]}.{found[2]}")
    if found := re.search(r'Parser key "([\w.]+)": Unable to load config', message):
        return _no_section(found[1], [name for name in flatten(RunConfig()) if name.startswith(f"{found[1]}.")])
    if found := re.match(r'Parser key "eval\.tasks": (.*)', message):
        if option := re.search(r"Option '(\w+)' is not accepted", found[1]):
            return f"--eval.tasks: a task has no field {option[1]}, only {', '.join(f.name for f in fields(EvalTask))}"
        wrong = re.search(r"EvalTask': Parser key \"(\w+)\": (.*)", found[1])
        if not wrong:
            return f"--eval.tasks: give a list such as {EXAMPLE_TASKS}"
        message = f"--eval.tasks, {wrong[1]}: {wrong[2]}"
    message = re.sub(r'Parser key "([\w.]+)":', r"--\1:", message).replace("<class '", "").replace("'>", "")
    message = re.sub(r"Expected a typing\.Literal\[(.*?)\]", r"Expected one of \1", message)
    message = re.sub("Expected a (?:list|tuple)", "Expected a list [..., ...]", message)
    for kind, words in {"int": "a whole number", "float": "a number", "bool": "true or false"}.items():
        message = re.sub(rf"Expected a {kind}\b", f"Expected {words}", message)
    union = r"Does not validate against any of the Union subtypes .*? Errors: - (.*) Given value type: .*? Given value:"
    if found := re.search(union, message):
        expected = found[1].replace(" - ", "; or: ").replace("Expected a NoneType", "null")
        message = f"{message[: found.start()]}{expected}. Got value:{message[found.end() :]}"
    return message


def _unknown(flag: str) -> str:
    known = [f"--{name}" for name in flatten(RunConfig())]
    leaf = flag.rpartition(".")[2].lstrip("-")
    near = difflib.get_close_matches(flag, known, n=3) or [n for n in known if n.rpartition(".")[2] == leaf]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"there is no field {flag}{hint} (python -m train --help lists every field)"


def _no_section(name: str, inside: list[str]) -> str:
    return f"--{name} is a section of fields, not one: give those that you mean, such as --{inside[0]}"
