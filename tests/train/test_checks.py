"""What a configuration may be: the checks that a run, the doctor and `submit` share."""

import math
from operator import attrgetter

import pytest

from data_pipeline.config import Source
from train.checks import RANGES, check, check_ranges, hints
from train.config import EvalTask, RunConfig


def described() -> RunConfig:
    config = RunConfig()
    config.data.train = "shards"
    return config


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("checkpoint", "keep", -1),
        ("optim", "clip_grad", -1.0),
        ("optim", "ema", 1.0),
        ("loss", "tile", 0),
        ("loss", "label_smoothing", 1.5),
        ("model", "temperature", 0.0),
        ("model", "max_logit_scale", 0.5),
        ("train", "steps", -1),
        ("train", "resident", 0),
        ("eval", "batch", 0),
        ("model.image", "lr", -1e-4),
        ("model.text", "layer_decay", 0.0),
        ("model.image", "locked_until", -2),
        ("model.self_supervision", "mask", 0.0),
        ("model.multiscale", "weight", math.inf),
        ("optim", "beta2", 1.0),
        ("optim", "eps", 0.0),
        ("optim", "cooldown_steps", -1),
        ("optim", "lr", math.inf),
        ("optim", "min_lr", -1.0),
        ("train", "seed", 2**63),
        ("train", "max_skipped", -1),
        ("data", "max_bad_fraction", -0.1),
        ("data", "cache_gb", math.inf),
        ("balance", "every", 0),
        ("balance", "smoothing", 1.0),
        ("balance", "smoothing", -0.1),
        ("balance", "strength", 0.0),
        ("balance", "strength", 1.5),
        ("balance", "max", 1.0),
        ("data", "lanes", 0),
        ("data", "max_tokens", 2),
        ("data", "workers", -1),
        ("train", "global_batch", 0),
    ],
)
def test_numbers_out_of_their_range_are_refused_before_anything_starts(section, name, value):
    config = described()
    check(config)
    setattr(attrgetter(section)(config), name, value)
    with pytest.raises(ValueError, match=f"{section}.{name} {value}: give "):
        check(config)


def test_every_range_is_one_of_a_field_and_holds_for_the_default():
    check_ranges(RunConfig())
    assert all(wanted for _, wanted in RANGES.values())


def change(config: RunConfig, **values: object) -> None:
    for name, value in values.items():
        *sections, field = name.split("__")
        setattr(attrgetter(".".join(sections))(config) if sections else config, field, value)


@pytest.mark.parametrize(
    ("values", "processes", "message"),
    [
        ({"name": ""}, None, "^name is empty: give one, or leave it out for run$"),
        ({"name": "../x"}, None, "^`name` ../x: give what its directory in runs_dir is called"),
        ({"data__background": (300, 0, 0)}, None, r"data.background is \[300, 0, 0\]: .* 0 to 255"),
        ({"data__train": ""}, None, "data.train is empty"),
        ({"data__mode": "stream"}, None, "train.steps 0: stream mode has no manifest"),
        ({"data__mode": "stream", "train__steps": 2, "data__train": [Source("a")]}, None, "one pattern of shards"),
        ({"data__image_size": 0}, None, "data.image_size"),
        ({"data__eval_crop": 2.0}, None, "data.eval_crop"),
        ({"data__caption__templates": ["no place"]}, None, "no place"),
        ({"train__global_batch": 100}, None, "global_batch 100 is not divisible by micro_batch 128: .* such as 128"),
        ({"train__global_batch": 384}, 2, "global_batch 384 is not divisible by 2 processes x micro_batch 128: .* 256"),
        ({"model__temperature": 0.001}, None, "model.temperature 0.001: the run keeps it from 0.01"),
        ({"model__temperature": 2.0}, None, "model.temperature 2.0: .* to 1"),
        ({"optim__cooldown_steps": 5}, None, "optim.cooldown_steps 5 is for optim.schedule constant: set that"),
        (
            {"parent__step": "5"},
            None,
            "parent.step 5 is a checkpoint of parent.run, which is not given; .* train.steps",
        ),
        ({"parent__run": "x", "parent__step": "last"}, None, "parent.step last: give a number of steps, best, or"),
        ({"model__multiscale__fuse": True}, None, "model.multiscale.fuse needs"),
        ({"model__self_supervision__image": -1.0}, None, "model.self_supervision.image"),
        ({"model__image__norm": "sync_batch"}, 4, "train.resident 1: .* all 2 micro-batches .* set train.resident 2"),
        ({"eval__tasks": [EvalTask(task="retrieval", data="x")]}, None, "eval.tasks: name '' of entry 0"),
        ({"eval__tasks": [EvalTask("a", data="x"), EvalTask("a", data="y")]}, None, "two are called a"),
        ({"eval__tasks": [EvalTask("a")]}, None, "eval.tasks, a: retrieval has no `data`"),
        ({"eval__tasks": [EvalTask("a", "zero-shot", "x")]}, None, "task zero-shot: .* did you mean zeroshot"),
        ({"eval__tasks": [EvalTask("a", "probe", "x", classnames="f")]}, None, "classnames f is for the task zeroshot"),
        ({"data__val": "x", "eval__tasks": [EvalTask("val", data="y")]}, None, "two are called val"),
    ],
)
def test_fields_that_do_not_fit_are_refused(values, processes, message):
    config = described()
    check(config, 8)
    change(config, **values)
    with pytest.raises(ValueError, match=message):
        check(config, processes)


def test_a_synchronized_norm_may_see_the_whole_share():
    config = described()
    config.model.image.norm = "sync_batch"
    check(config, 8)
    config.train.resident = 2
    check(config, 4)


def test_what_a_run_cannot_have_meant_is_said():
    config = described()
    config.optim.warmup_steps, config.data.val = 500, "val"
    assert hints(config, 500) == []
    assert hints(config, 250) == [
        "optim.warmup_steps 500 is more than the 250 steps of the run: the learning rate ends at 50% of its peak"
    ]
    config.train.steps, config.train.epochs, config.optim.warmup_steps = 250, 3.0, 0
    assert hints(config, 250) == ["train.epochs 3 is not used, since train.steps 250 is given"]
    config.train.epochs, config.optim.warmup_steps, config.optim.cooldown_steps = 1.0, 200, 60
    assert "optim.cooldown_steps 60 and optim.warmup_steps 200 are more than the 250 steps" in hints(config, 250)[0]
    config.optim.cooldown_steps = 50
    assert hints(config, 250) == []
    config.data.val = ""
    assert hints(config, 250)[-1].endswith(
        "make a manifest of them (python -m data_pipeline pack, or index) and give it as --data.val"
    )
