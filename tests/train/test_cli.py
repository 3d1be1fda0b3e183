"""Config <-> YAML <-> command line."""

import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from data_pipeline.config import Source
from train import cli
from train.config import ParentConfig, RunConfig
from train.curate import main as curate
from train.export.__main__ import main as export

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "train" / "configs").glob("*.yaml"))


def test_what_is_dumped_reloads_equal(tmp_path: Path) -> None:
    config = cli.parse(
        [
            *("--data.train", '[{"data": "a", "weight": 2}, {"data": "b"}]', "--data.augment.scale", "[0.5, 1]"),
            *("--data.normalize", "[[0.1, 0.2, 0.3], [1, 1, 1]]", "--model.image.lr", "1e-4", "--train.steps", "7"),
        ]
    )
    assert config.data.train == [Source("a", 2.0), Source("b", 1.0)]
    assert config.model.image.lr == 1e-4 and config.data.augment.scale == (0.5, 1.0)
    (tmp_path / "config.yaml").write_text(cli.to_yaml(config))
    assert cli.load(tmp_path / "config.yaml") == config


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("optim: {lr: 1e-4, beta1: 0.8}\n")
    config = cli.parse(["--config", str(tmp_path / "run.yaml"), "--optim.lr", "0.5"])
    assert (config.optim.lr, config.optim.beta1, config.optim.beta2) == (0.5, 0.8, RunConfig().optim.beta2)


def test_the_command_line_overrides_the_file_wherever_that_is_on_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("optim: {lr: 1e-4, beta1: 0.8, beta2: 0.7}\n")
    (tmp_path / "b.yaml").write_text("optim: {beta1: 0.6}\n")
    files = [f"--config={tmp_path / 'a.yaml'}", "--config", str(tmp_path / "b.yaml")]
    flags = ["--optim.lr", "0.5", "--name", "x"]
    for line in ([*files, *flags], [*flags, *files], [files[0], *flags, *files[1:]]):
        config = cli.parse(line)
        assert (config.optim.lr, config.optim.beta1, config.optim.beta2, config.name) == (0.5, 0.6, 0.7, "x")


def test_the_home_directory_is_meant_by_its_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    sources = '[{"data": "~/a", "weight": 2}, {"data": "/b~c"}]'
    config = cli.parse(["--runs_dir", "~/runs", "--data.train", sources, "--model.text.name", "~/bert"])
    assert (config.runs_dir, config.model.text.name) == ("/home/me/runs", "/home/me/bert")
    assert config.data.train == [Source("/home/me/a", 2.0), Source("/b~c")]


@pytest.mark.parametrize(
    ("main", "line"),
    [
        (export, ["--run=~/gone", "--to", "torch", "out"]),
        (curate, ["--index=~/gone", "--out", "x.json"]),
    ],
)
def test_commands_know_the_home_directory_too(main, line, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """As in --run=~/runs/a, which no shell expands."""
    monkeypatch.setenv("HOME", "/home/me")
    assert main(line) == 2
    assert "/home/me/gone" in capsys.readouterr().err
    options = cli.expanded(Namespace(run="~/runs/a", step=None, held_out=["~/x", "y"], top=3))
    assert options == Namespace(run="/home/me/runs/a", step=None, held_out=["/home/me/x", "y"], top=3)


def test_messages_hold_no_signature() -> None:
    shown = cli.with_flags("data.val: https://me:word@host/m.json?X-Amz-Signature=5ec7e7 could not be read")
    assert shown == "--data.val: https://***@host/m.json?*** could not be read"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.l", "1"], "there is no field --optim.l; did you mean --optim.lr"),
        (["--global_batch", "1"], "there is no field --global_batch; did you mean --train.global_batch"),
        (["--optim.lr", "fast"], "--optim.lr: Expected a number. Got value: fast"),
        (["--model.image.norm", "layer"], "Expected one of 'batch', 'sync_batch', 'group', 'frozen'. Got value: layer"),
        (["--model.image.lr", "none"], "--model.image.lr: Expected a number; or: null. Got value: none"),
        (["--eval.tasks", "[knn]"], '--eval.tasks: give a list such as [{"name": "birds", "task": '),
        (["--eval.tasks", '[{"task": "knn", "nam": 1}]'], "--eval.tasks: a task has no field nam, only name, task, "),
        (["--eval.tasks", '[{"neighbours": "x"}]'], "--eval.tasks, neighbours: Expected a whole number. Got value: x"),
        (["--from", "", "--name", "x"], "--from is empty: give a run"),
        (["--name", "x", "--from-weights="], "--from-weights is empty: give a run"),
        (["--train.global-batch", "8"], "there is no field --train.global-batch; did you mean --train.global_batch"),
        (["--train", '{"steps": null}'], "--train.steps is null: give a value"),
        (["--data.augment", "strong"], "give those that you mean, such as --data.augment.policy"),
        (["--data.train", '["a", "b"]'], "several sources are a list such as"),
        (["--config", "missing.yaml"], "--config missing.yaml: No such file"),
    ],
)
def test_a_mistake_names_the_field_and_the_remedy(arguments: list[str], message: str) -> None:
    assert cli.parse([]) == RunConfig()
    with pytest.raises(ValueError) as error:
        cli.parse(arguments)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_command_ends_with_what_it_returns_and_a_mistake_with_2(monkeypatch, capsys) -> None:
    def fails(error: Exception) -> int:
        raise error

    monkeypatch.delenv("DUET_DEBUG", raising=False)
    assert [cli.exit_status(lambda status=status: status) for status in (None, 0, 85)] == [0, 0, 85]
    assert cli.exit_status(lambda: fails(ValueError("top 0: give 1")), ["top"]) == 2
    assert capsys.readouterr().err == "error: --top 0: give 1\n"
    assert cli.exit_status(lambda: fails(OSError("full")), mistakes=(ValueError, OSError)) == 2
    with pytest.raises(OSError, match="full"):
        cli.exit_status(lambda: fails(OSError("full")))
    monkeypatch.setenv("DUET_DEBUG", "1")
    with pytest.raises(ValueError, match="top 0"):
        cli.exit_status(lambda: fails(ValueError("top 0: give 1")))


def test_stdout_has_the_result_alone(capfd) -> None:
    with cli.stdout_kept():
        os.write(1, b"from a library\n")
    os.write(1, b"{}\n")
    assert capfd.readouterr() == ("{}\n", "from a library\n")


def test_null_is_taken_where_the_field_has_a_meaning_for_it(tmp_path: Path) -> None:
    config = cli.parse(["--train.resident", "null", "--data.workers", "null"])
    assert config.train.resident is None and config.data.workers is None
    (tmp_path / "run.yaml").write_text(cli.to_yaml(config))
    assert cli.load(tmp_path / "run.yaml") == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("optim: {learning_rate: 1}", r"there is no field --optim\.learning_rate"),
        ("optims: {lr: 1}", r"there is no field --optims"),
        ("optim: {lr: 1}\ntrain: {steps: 1}\noptim: {beta1: 0.5}", "optim is there twice, in line 1 and in line 3"),
        ("optim:\n  lr: 1\n  lr: 2", "lr is there twice, in line 2 and in line 3"),
        ("optim:", "--optim is a section of fields"),
        ("data: {augment: strong}", r"such as --data\.augment\.policy"),
        ("train: {steps: null}", r"--train\.steps is null"),
        ("data: {train: [{data: null}]}", r"--data\.train"),
        ("- optim", "it has no fields"),
        ("# nothing", "it has no fields"),
        ("optim: {lr: [", "no YAML in line 1"),
        ("\x80", "utf-8"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_by_name(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message) as error:
        cli.parse(["--config", str(path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("optim.lr 0: give more", "--optim.lr 0: give more"),
        ("global_batch 3: raise `micro_batch`", "--train.global_batch 3: raise --train.micro_batch"),
        ("--data.lanes 3 and data.lanes", "--data.lanes 3 and --data.lanes"),
        ("no file runs/data.val/x, seed or `image`", "no file runs/data.val/x, seed or `image`"),
        ("fit f needs `data`; data is short", "--fit f needs --data; data is short"),
        ("name a: choose a class name, or another `name`", "--name a: choose a class name, or another --name"),
        ("runs_dir, `name`: not there", "--runs_dir, --name: not there"),
        ("parent.run a: give parent.step, or parent.take weights", "--from a: give --step, or --from-weights"),
        (
            "choose another `name`, under which parent.take weights, parent.run a",
            "choose another --name, under which --from-weights a",
        ),
    ],
)
def test_a_librarys_message_gets_the_flags_of_the_command(message: str, shown: str) -> None:
    assert cli.with_flags(message, ["fit", "data"]) == shown


def test_differences_leave_out_the_machine() -> None:
    before, after = RunConfig(), RunConfig()
    after.train.seed, after.data.workers, after.train.resident, after.name = 3, 9, 4, "other"
    assert cli.differences(before, after) == ["train.seed: 0 -> 3"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    config = cli.load(path)
    assert config.name in [other.stem for other in CONFIGS if other.resolve() == path.resolve()]  # seed.yaml is a link
    assert config.train.global_batch % config.train.micro_batch == 0


def test_every_field_is_described_in_the_help() -> None:
    text = subprocess.run(
        [sys.executable, "-m", "train", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in cli.flatten(RunConfig()):
        (described,) = re.findall(rf"^  --{re.escape(name)}[ ,](.*\n(?: {{10,}}.*\n)*)", text, flags=re.MULTILINE)
        assert len(described.partition("(type:")[0].split()) > 2, f"--{name} is not described"


def test_the_run_that_is_started_from_gives_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    before = RunConfig(name="old", runs_dir=str(tmp_path), parent=ParentConfig("older", "4", "weights"))
    before.optim.lr, before.optim.beta1, before.train.seed = 0.5, 0.7, 3
    (tmp_path / "old" / "config.yaml").write_text(cli.to_yaml(before))
    (tmp_path / "new.yaml").write_text("optim: {beta1: 0.8}\n")
    old = str(tmp_path / "old")
    for line in (
        ["--from", old, "--optim.lr", "1"],
        ["--optim.lr", "1", f"--from={old}"],
        ["--parent.run", old, "--optim.lr=1"],
    ):
        config = cli.parse([*line, "--name", "new", "--config", str(tmp_path / "new.yaml")])
        assert (config.optim.lr, config.optim.beta1, config.train.seed, config.name) == (1.0, 0.8, 3, "new")
        assert config.parent == ParentConfig(old)
    assert cli.parse(["--from-weights", old, "--step", "best"]).parent == ParentConfig(old, "best", "weights")
    assert cli.parse(["--step=7", "--from", old]).parent == ParentConfig(old, "7")
    with pytest.raises(ValueError, match=r"parent\.run .*older: there is no run in it"):
        cli.parse(["--from", f"{old}er", "--name", "new"])
