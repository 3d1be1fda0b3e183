"""What a refused configuration is advised to be is not refused: the mistake is made, the advice is followed."""

import re
import shlex
from operator import attrgetter
from pathlib import Path

import pytest

from data_pipeline.embeddings.index import open_index
from train import embed
from train.checks import RANGES, check
from train.config import RunConfig


def described() -> RunConfig:
    config = RunConfig()
    config.data.train = "shards"
    return config


def put(config: RunConfig, name: str, value: object) -> None:
    section, _, field = name.rpartition(".")
    setattr(attrgetter(section)(config) if section else config, field, value)


def refused(config: RunConfig, processes: int | None = None) -> str:
    with pytest.raises(ValueError) as error:
        check(config, processes)
    return str(error.value)


@pytest.mark.parametrize("name", [name for name, (_, wanted) in RANGES.items() if "such as" in wanted])
def test_the_number_that_a_range_names_is_within_it(name: str) -> None:
    config = described()
    put(config, name, -7.0 if "." in str(attrgetter(name)(config)) else -7)
    advised = re.search(r"such as ([\d.e-]+)", refused(config))
    assert advised is not None
    put(config, name, float(advised[1]))
    check(config)


@pytest.mark.parametrize(
    ("mistakes", "processes", "found", "field"),
    [
        ({"model.temperature": 0.01, "model.max_logit_scale": 30.0}, None, r"such as at ([\d.]+)", "model.temperature"),
        ({"model.temperature": 2.0, "model.max_logit_scale": 7.0}, None, r"such as at ([\d.]+)", "model.temperature"),
        ({"model.image.norm": "sync_batch"}, 4, r"set train.resident (\d+)", "train.resident"),
        ({"train.global_batch": 100, "train.micro_batch": 25}, 2, r"such as (\d+)", "train.global_batch"),
        ({"train.global_batch": 100, "train.micro_batch": 50}, None, r"such as (\d+)", "train.global_batch"),
        ({"train.global_batch": 384}, 2, r"such as (\d+)", "train.global_batch"),
        ({"model.multiscale.enabled": True, "model.multiscale.heads": 7}, None, r"try (\d)", "model.multiscale.heads"),
        ({"optim.cooldown_steps": 5}, None, r"is for optim.schedule (constant)", "optim.schedule"),
        ({"optim.cooldown_steps": 5}, None, r"or leave it (o)ut", "optim.cooldown_steps"),
        ({"checkpoint.best": "val/R1", "data.val": "x"}, None, r"there are (\S+),", "checkpoint.best"),
        ({"model.self_supervision.text": 1.0, "model.text.locked_until": -1}, None, r"(0)$", "model.text.locked_until"),
        ({"model.self_supervision.image": 1.0, "model.image.locked_until": -1}, None, r"(0)$",
         "model.self_supervision.image"),
        ({"model.multiscale.fuse": True}, None, r"needs model.multiscale.enabled (true)", "model.multiscale.enabled"),
        ({"runs_dir": "s3://bucket/runs"}, None, r"such as (\w+);", "runs_dir"),
    ],
)  # fmt: skip
def test_what_is_advised_is_not_refused(mistakes, processes, found, field) -> None:
    config = described()
    for name, value in mistakes.items():
        put(config, name, value)
    advised = re.search(found, refused(config, processes))
    assert advised is not None
    value: object = {"o": 0, "true": True}.get(advised[1], advised[1])
    if re.fullmatch(r"[\d.]+", str(value)):
        value = float(str(value)) if "." in str(value) else int(str(value))
    put(config, field, value)
    check(config, processes)


def test_patience_leads_to_what_it_needs_in_steps_that_each_are_right() -> None:
    config = described()
    config.train.patience = 3
    assert "give checkpoint.best" in refused(config)
    config.checkpoint.best = "val/t2i_R@1"
    assert "give data.val, or eval.tasks" in refused(config)
    config.data.val = "held out"
    assert "give eval.every" in refused(config)
    config.eval.every = 100
    check(config)


def test_the_command_that_makes_an_index_is_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        open_index(tmp_path / "gone")
    command = str(error.value).partition("make it with: python -m train.embed ")[2]
    options = embed.make_parser().parse_args(shlex.split(command))
    assert options.out == str(tmp_path / "gone")
