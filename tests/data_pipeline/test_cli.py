"""The command line: which commands there are, exit codes, messages instead of tracebacks, and a quick start."""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.__main__ import COMMANDS, main
from data_pipeline.commands.rows import CAPTION_COLUMNS, IMAGE_COLUMNS
from data_pipeline.samples.limits import IMAGE_EXTENSIONS


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "data_pipeline", *arguments], capture_output=True, text=True, check=False
    )


def test_help_lists_the_commands_and_imports_none_of_them():
    code = (
        "import sys; sys.argv = ['x', '--help']\n"
        "import data_pipeline.__main__ as cli\n"
        "try: cli.main()\n"
        "except SystemExit as done: assert done.code == 0\n"
        "heavy = {'torch', 'numpy', 'PIL', 'pyarrow', 'fsspec', 'webdataset'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_describes_its_flags(name, capsys):
    with pytest.raises(SystemExit) as done:
        main([name, "--help"])
    assert done.value.code == 0
    assert f"python -m data_pipeline {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pack", "index", "verify", "inspect"])
def test_packing_and_indexing_do_not_import_torch(name):
    code = f"import sys, {COMMANDS[name][0]}; assert not {{'torch', 'datasets', 'matplotlib'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_the_two_functions(name):
    module = importlib.import_module(COMMANDS[name][0])
    assert callable(module.add_arguments)
    assert callable(module.run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["pac"], "invalid choice"),
        (["pack", "in", "out", "--shard", "5"], "unrecognized arguments"),  # no abbreviations
        (["pack", "in", "out", "--shard-size", "0"], "--shard-size"),
        (["pack", "in", "out", "--quality", "101"], "--quality"),
        (["pack", "in", "out", "--resize", "-3"], "--resize"),
        (["pack", "in", "out", "--workers", "0"], "--workers"),
        (["index", "x.tar", "--workers", "0"], "--workers"),
        (["verify", "x", "--workers", "two"], "--workers"),
        (["inspect", "x", "--count", "0"], "--count"),
    ],
)
def test_wrong_flags_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 2
    assert message in capsys.readouterr().err


def test_errors_are_messages_not_tracebacks(tmp_path):
    done = command("verify", str(tmp_path / "nothing"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    done = command("index", str(tmp_path / "*.tar"))
    assert done.returncode == 2
    assert "no shard matches" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_examples_that_its_parser_takes(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out.partition("examples:")[2]
    module = importlib.import_module(COMMANDS[name][0])
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    examples = re.findall(rf"python -m data_pipeline {name}(.*?)(?:   .*)?$", shown, re.MULTILINE)
    assert examples
    for example in examples:
        parser.parse_args(shlex.split(example))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pack", (*IMAGE_COLUMNS, *CAPTION_COLUMNS, "folder", "--split")),
        ("index", (*IMAGE_EXTENSIONS, "txt", "json", "`captions`", "cls", "https", "s3", "gs", "first dot")),
        ("verify", ("https://host/data/manifest.json",)),
    ],
)
def test_help_says_what_a_command_knows(name, words, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    shown = capsys.readouterr().out
    assert all(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", shown) for word in words)


def test_what_the_readme_says_of_ten_layouts_and_more_is_taken_by_the_parsers():
    readme = Path(__file__).resolve().parents[2] / "README.md"
    rows = readme.read_text().partition("| What you have |")[2].partition("\n\n")[0].splitlines()[2:]
    assert len(rows) >= 10
    for row in rows:
        commands = [
            text for text in re.findall(r"`([^`]+)`", row.split(" | ")[1]) if text.startswith(("pack ", "index "))
        ]
        assert commands or "img2dataset" in row, row
        for given in commands:
            name, *arguments = shlex.split(given)
            parser = argparse.ArgumentParser()
            importlib.import_module(COMMANDS[name][0]).add_arguments(parser)
            parser.parse_args(arguments)
