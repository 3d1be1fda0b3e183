"""Every check of a configuration that needs neither data nor model: what a run, the doctor and `submit` refuse.

`RANGES` holds numbers whose type allows values that would spoil the run in silence; the other checks are of fields that
do not fit each other, or the number of processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import PurePath

from data_pipeline.samples.text import check_captions
from data_pipeline.samples.transforms import eval_transform, train_transform
from data_pipeline.stages.slots import check_batch
from train import terms
from train.cli import flatten
from train.config import ModelConfig, RunConfig, TrainConfig
from train.evaluation.best import check_best
from train.evaluation.suite import NO_HELD_OUT, check_tasks
from train.run.profiler import steps_of


def _at_least(least: float) -> Callable[[float], bool]:
    return lambda value: value >= least


def _above(bound: float) -> Callable[[float], bool]:
    return lambda value: value > bound


def _share(value: float) -> bool:
    return 0 <= value < 1


def _above_to_1(value: float) -> bool:
    return 0 < value <= 1


def _0_to_1(value: float) -> bool:
    return 0 <= value <= 1


RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "data.cache_gb": (_at_least(0), "0 or more"),
    "data.lanes": (_at_least(1), "at least 1"),
    "data.max_bad_fraction": (_0_to_1, "a share from 0 to 1"),
    "data.max_pixels": (_at_least(1), "at least 1"),
    "data.max_tokens": (_at_least(3), "at least 3, the special tokens and one more"),
    "data.prefetch": (_at_least(1), "micro-batches, at least 1"),
    "data.shuffle_shards": (_at_least(1), "at least 1"),
    "data.workers": (
        _at_least(0),
        "0, which loads in the training process, or more; or null for one, or as many as fit",
    ),
    "balance.every": (_at_least(1), "the steps between measurements, at least 1"),
    "balance.smoothing": (_share, "a decay of at least 0 and below 1, such as 0.8"),
    "balance.strength": (lambda value: 0 < abs(value) <= 1, "a number between -1 and 1 that is not 0"),
    "balance.max": (_above(1), "more than 1, such as 4: multipliers are within [1/max, max]"),
    "checkpoint.every": (_at_least(0), "steps, 0 saves at the end alone"),
    "checkpoint.keep": (_at_least(0), "how many stay, 0 keeps all"),
    "eval.every": (_at_least(0), "steps, 0 is off"),
    "eval.batch": (_at_least(1), "at least 1"),
    "eval.chunk": (_at_least(1), "at least 1"),
    "eval.cache_gb": (_at_least(0), "0 or more"),
    "loss.tile": (_at_least(1), "at least 1"),
    "loss.label_smoothing": (_share, "at least 0 and below 1"),
    "model.image.dropout": (_share, "a share of at least 0 and below 1, or null for what the model has"),
    "model.image.drop_path": (_share, "a probability of at least 0 and below 1, or null for what the model has"),
    "model.image.layer_decay": (_above_to_1, "a factor above 0 and at most 1, which is off"),
    "model.image.locked_until": (_at_least(-1), "a step, 0 for from the start, or -1 for never"),
    "model.image.locked_stages": (_at_least(0), "how many stages, 0 is none"),
    "model.image.lr": (_at_least(0), "0 or more, or null for optim.lr"),
    "model.text.layer_decay": (_above_to_1, "a factor above 0 and at most 1, which is off"),
    "model.text.locked_until": (_at_least(-1), "a step, 0 for from the start, or -1 for never"),
    "model.text.pieces": (_at_least(1), "at least 1"),
    "model.text.locked_layers": (_at_least(0), "how many layers, 0 is none"),
    "model.text.lr": (_at_least(0), "0 or more, or null for optim.lr"),
    "model.text.positions": (_at_least(0), "tokens, 0 for as many as the encoder comes with"),
    "model.self_supervision.mask": (_above_to_1, "a share of the words above 0 and at most 1, such as 0.15"),
    "model.embed_dim": (_at_least(1), "at least 1"),
    "model.temperature": (_above(0), "a number above 0, such as 0.07"),
    "model.max_logit_scale": (_above(1), "a number above 1, such as 100"),
    "optim.lr": (_at_least(0), "0 or more"),
    "optim.beta1": (_share, "a decay of at least 0 and below 1, such as 0.9"),
    "optim.beta2": (_share, "a decay of at least 0 and below 1, such as 0.98"),
    "optim.eps": (_above(0), "a number above 0, such as 1e-6"),
    "optim.min_lr": (_0_to_1, "a share of the peak, from 0 to 1"),
    "optim.weight_decay": (_at_least(0), "0 or more"),
    "optim.warmup_steps": (_at_least(0), "steps, 0 is none"),
    "optim.cooldown_steps": (_at_least(0), "steps, 0 is none"),
    "optim.clip_grad": (_at_least(0), "the largest norm, 0 is off"),
    "optim.ema": (_share, "a decay below 1, 0 is off"),
    "tracking.log_every": (_at_least(1), "at least 1"),
    "tracking.peak_tflops": (_at_least(0), "1e12 operations a second, such as 989, or 0 for what the GPU's name says"),
    "tracking.diagnostics_every": (_at_least(0), "steps, 0 is off"),
    "train.max_skipped": (_at_least(0), "0 or more"),
    "train.patience": (_at_least(0), "evaluations, 0 is off"),
    "train.seed": (lambda value: 0 <= value < 2**63, "at least 0 and below 2^63"),
    "train.resident": (_at_least(1), "at least 1"),
    "train.steps": (_at_least(0), "how many, or 0 for as many as train.epochs are"),
    "train.epochs": (_above(0), "a number above 0, such as 1.5"),
    "train.global_batch": (_at_least(1), "at least 1"),
    "train.micro_batch": (_at_least(1), "at least 1"),
}
"""Field -> whether a value will do, and what to give instead."""
NAMES = ("name", "runs_dir", "model.image.name", "model.image.weights", "model.text.name")


def check(config: RunConfig, processes: int | None = None) -> None:
    """Raises ValueError for the first mistake in a configuration, with the field, its value and a remedy.

    processes: how many the run has; None where that is not known yet.
    """
    check_names(config)
    check_ranges(config)
    check_data(config)
    lanes = config.data.lanes if config.data.mode == "indexed" else 1
    check_batch(config.train.global_batch, config.train.micro_batch, processes or 1, lanes)
    check_temperature(config)
    check_schedule(config)
    steps_of(config.tracking.profile)
    check_parent(config)
    terms.check(config.model)
    check_compile(config)
    check_tasks(config)
    check_best(config)
    if processes is not None:
        check_resident(config, processes)


def check_names(config: RunConfig) -> None:
    """Raises ValueError for a field that is empty and names something that every run has, or a name that is a place."""
    values, usual = flatten(config), flatten(RunConfig())
    for name in NAMES:
        if not values[name]:
            raise ValueError(f"{name} is empty: give one, or leave it out for {usual[name]}")
    if PurePath(config.name).is_absolute() or ".." in PurePath(config.name).parts:
        raise ValueError(
            f"`name` {config.name}: give what its directory in runs_dir is called, such as {usual['name']}"
        )


def check_ranges(config: RunConfig) -> None:
    """Raises ValueError for the first number that is out of its range or not finite, with what it has to be."""
    values = flatten(config)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} {value}: give {RANGES[name][1] if name in RANGES else 'a finite number'}")
    for name, (will_do, wanted) in RANGES.items():
        if values[name] is not None and not will_do(values[name]):
            raise ValueError(f"{name} {values[name]}: give {wanted}")


def check_temperature(config: RunConfig) -> None:
    """Raises ValueError where the logit scale would start outside of the range in which it is kept from then on."""
    model, least = config.model, 1 / config.model.max_logit_scale
    if config.loss.kind == "softmax" and not least <= model.temperature <= 1:
        inside = max(math.ceil(least * 100) / 100, ModelConfig.temperature)
        raise ValueError(
            f"model.temperature {model.temperature}: the run keeps it from {least:g}, which is 1 / "
            f"model.max_logit_scale, to 1; start it in there, such as at {inside:g}"
        )


def check_schedule(config: RunConfig) -> None:
    """Raises ValueError where the learning rate has a cooldown that its schedule does not read."""
    if config.optim.cooldown_steps and config.optim.schedule != "constant":
        raise ValueError(
            f"optim.cooldown_steps {config.optim.cooldown_steps} is for optim.schedule constant: set that, or leave it "
            f"out, since optim.schedule {config.optim.schedule} falls by itself"
        )


def check_parent(config: RunConfig) -> None:
    """Raises ValueError where `parent` names no run, or no step; whether they are there is seen at the start."""
    parent = config.parent
    if not parent.run and parent.step:
        raise ValueError(
            f"parent.step {parent.step} is a checkpoint of parent.run, which is not given; for how many steps to "
            "train, give train.steps"
        )
    if parent.step and parent.step != "best" and not parent.step.isdecimal():
        raise ValueError(f"parent.step {parent.step}: give a number of steps, best, or leave it out for the newest")


def hints(config: RunConfig, steps: int) -> list[str]:
    """What a run of so many steps should know of a configuration that is right, but may not be what was meant."""
    train, warmup = config.train, config.optim.warmup_steps
    found = []
    if warmup > steps:
        found.append(
            f"optim.warmup_steps {warmup} is more than the {steps} steps of the run: the learning rate ends at "
            f"{steps / warmup:.0%} of its peak"
        )
    cooldown = config.optim.cooldown_steps
    if cooldown and cooldown > steps - warmup:
        found.append(
            f"optim.cooldown_steps {cooldown} and optim.warmup_steps {warmup} are more than the "
            f"{steps} steps of the run: the learning rate does not reach its peak"
        )
    if train.steps and train.epochs != TrainConfig.epochs:
        found.append(f"train.epochs {train.epochs:g} is not used, since train.steps {train.steps} is given")
    if not config.data.val and not config.eval.tasks:
        found.append(NO_HELD_OUT)
    return found


def check_data(config: RunConfig) -> None:
    """Raises ValueError where fields of `data` cannot be used, whatever the data are."""
    data = config.data
    if not data.train:
        raise ValueError("data.train is empty: give the manifest.json that `python -m data_pipeline index` wrote")
    if data.mode == "stream" and not isinstance(data.train, str):
        raise ValueError("data.train: stream mode reads one pattern of shards, not a list of sources")
    if data.mode == "stream" and not config.train.steps:
        raise ValueError("train.steps 0: stream mode has no manifest that counts an epoch, so give train.steps")
    if "://" in config.runs_dir:
        raise ValueError(
            f"runs_dir {config.runs_dir}: runs are written to a local or mounted directory, such as runs; copy them "
            f"elsewhere afterwards"
        )
    train_transform(data)
    eval_transform(data)
    check_captions(data.caption)


def check_compile(config: RunConfig) -> None:
    """Raises ValueError where a tower does what torch.compile has no program for."""
    image = config.model.image
    if not config.train.compile:
        return
    if image.norm == "sync_batch":
        raise ValueError(
            "train.compile true: with model.image.norm sync_batch processes talk to each other inside of the image "
            "tower; set train.compile to false, or take model.image.norm batch"
        )
    if image.checkpointing:
        raise ValueError("train.compile true does not go with model.image.checkpointing true; set one of them to false")


def check_resident(config: RunConfig, processes: int) -> None:
    """Raises ValueError where a synchronized norm would not see all images of a process's share in one forward."""
    share = config.train.global_batch // (config.train.micro_batch * processes)
    resident = config.train.resident
    if config.model.image.norm == "sync_batch" and resident is not None and share > resident:
        raise ValueError(
            f"train.resident {config.train.resident}: with model.image.norm sync_batch all {share} micro-batches of a "
            f"process go through the image tower together; set train.resident {share}, or take model.image.norm batch, "
            "whose statistics are those of a micro-batch"
        )
