"""Starting a run from another one: `--from RUN` takes all that it has learned, `--from-weights RUN` its weights alone.

Taken with everything: weights, AdamW's moments, the moving average, modality balance, the step, and the position in
the data. So the schedule of the new run is evaluated at that step, and where nothing that matters was changed the curve
is the old one, to the byte. A tower has to be the same one; what else has another name or shape (heads of a new term, a
projection of another length) is fresh, with moments of zero.

Position in the data: where samples come in the same order (as many in each shard, the same weights of sources, seed,
lanes and shuffle_shards), the new run takes the next sample, whatever is in the shards; with another global batch too,
where there is one source, except for what is left over of a batch. Any other order starts at its beginning.

With the weights alone the run starts at step 0, and a tower that does not fit is as the config says.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.storage.files import sha256_of
from train import checkpoint, cli, distributed
from train.checkpoint import TrainState
from train.config import TOWERS, RunConfig
from train.engine.base import MOMENTS, Engine
from train.engine.ema import WeightAverage
from train.feed import Feed
from train.model.pair import PairModel, build_model
from train.model.text_files import another_text, with_own_text
from train.run.directory import CONFIG, has_started
from train.run.lineage import as_recorded, in_full, read_record
from train.run.wandb import RUN_ID

OWN = ("mean", "std")
"""Buffers that a run has from its own data."""


def settled(config: RunConfig) -> RunConfig:
    """The configuration with `parent` in full: a run directory and a number of steps; a collective.

    A run that has started keeps the step that it started from, and its parent may be gone.

    Raises:
        ValueError: on all ranks, where the parent is the run itself, or has no such checkpoint.
    """
    if not config.parent.run:
        return config
    directory = Path(config.runs_dir) / config.name
    config = replace(config, parent=in_full(config.parent))
    if Path(config.parent.run).resolve() == directory.resolve():
        raise ValueError(f"name {config.name}: a run cannot start from itself, {directory}; give another `name`")
    if recorded := distributed.broadcast_object(_recorded(directory)):
        config = as_recorded(config, recorded)
    if not config.parent.step.isdecimal():
        found = in_full(replace(config.parent, run=str(_find(config)), step=""))
        config = replace(config, parent=replace(config.parent, step=found.step))
    return config


def _recorded(directory: Path) -> RunConfig | None:
    """The configuration of the run that has started in a directory; None where there is none, and on ranks but 0."""
    path = directory / CONFIG
    return cli.load(path) if distributed.is_main() and path.is_file() and has_started(directory) else None


def _find(config: RunConfig) -> Path:
    try:
        return checkpoint.find(config.parent.run, config.parent.step)
    except ValueError as error:
        raise ValueError(f"parent.run {config.parent.run}: {error}") from error


class Parent:
    """The checkpoint that a run starts from, as long as it has none of its own; a collective.

    Args:
        config: of the new run, with `parent` settled.
        directory: of the new run.

    Attributes:
        source: the configuration whose text encoder and tokenizer the run is built with.
        lines: what to say of the start.
        differences: one line for every field of the experiment that is not as in the parent.
        resumes, saved_text: as in train.begin; the run is a new one.

    Raises:
        ValueError: on all ranks, where the checkpoint is gone, damaged, or another one than the run has started from.
    """

    resumes = False

    def __init__(self, config: RunConfig, directory: Path):
        self.saved_text: Mapping[str, bytes] = {}
        self.config, self.directory = config, directory
        self.everything = config.parent.take == "all"
        self.path = _find(config)
        self.given = f"parent.run {config.parent.run}"
        if distributed.any_rank(not (self.path / checkpoint.STATE).is_file()):
            raise ValueError(f"{self.given}: {self.path} is not on every host: give a directory that they share")
        if problem := distributed.broadcast_object(self._problem() if distributed.is_main() else ""):
            raise ValueError(f"{self.given}: {problem}")
        self.before = cli.load(self.path / CONFIG)
        self.state = checkpoint.load_state(self.path)
        self.averaged = not self.everything and self.before.optim.ema > 0
        what = "everything" if self.everything else "the averaged weights" if self.averaged else "the weights"
        self.lines = [f"starts from {self.path}: {what} of step {self.state.step}"]
        self.source = config
        self.differences = [line for line in cli.differences(self.before, config) if not line.startswith("parent.")]
        self._taken: set[str] = set()
        self._fresh: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}

    def _problem(self) -> str:
        """What keeps the checkpoint from being used; empty where nothing does."""
        if damage := checkpoint.verify(self.path):
            return f"{self.path} is damaged ({damage}); give another parent.step"
        known = read_record(self.directory).get("checkpoint") if has_started(self.directory) else None
        if known and known != sha256_of(self.path / checkpoint.HASHES):
            return (
                f"{self.path} is another one than {self.directory} has started from: put that back, or start again "
                "under another `name`"
            )
        return ""

    def model(self, feed: Feed) -> PairModel:
        """The run's model with all of the parent's weights that go into it, on every rank alike.

        Raises:
            ValueError: on all ranks, where a tower or the tokenizer is another one, with everything; where no tower
                fits, with the weights alone.
        """
        other_text = self._other_text()
        if other_text and self.everything:
            raise ValueError(
                f"{self.given}: {other_text}\nGive the one of before, or parent.take weights, which starts at step 0 "
                "and leaves a tower that does not fit as the config says"
            )
        if not other_text:
            self.source = with_own_text(self.config, self.path)
        weights = checkpoint.load_part(self.path, "ema" if self.averaged else "model")
        model = build_model(self.source, feed.mean, feed.std, pretrained=False)
        misfits = {tower: self._misfit(model, tower, weights, other_text) for tower in TOWERS}
        misfits = {tower: why for tower, why in misfits.items() if why}
        if misfits:
            self._check_misfits(misfits)
            model = build_model(self._with_pretrained(misfits), feed.mean, feed.std)
        taken = {
            name: weights[name]
            for name, own in model.state_dict().items()
            if name in weights
            and weights[name].shape == own.shape
            and name not in OWN
            and model.branches.get(name.partition(".")[0]) not in misfits
        }
        model.load_state_dict(taken, strict=False)
        self._taken = set(taken)
        self._note(model, weights, misfits)
        return model

    def _other_text(self) -> str:
        """How the run's text encoder or tokenizer differs from the parent's; a collective."""
        found: tuple[str, str] = ("", "")
        if distributed.is_main():
            try:
                found = another_text(self.config, self.before, self.path), ""
            except ValueError as error:
                found = "", str(error)
        different, problem = distributed.broadcast_object(found)
        if problem:
            raise ValueError(problem)
        return different

    def _misfit(self, model: PairModel, tower: str, weights: dict[str, Tensor], other_text: str) -> str:
        """Why a tower is not the parent's, in words; empty where it is."""
        if tower == "text" and other_text:
            return other_text.partition("\n")[0].rstrip(":")
        own = {f"{tower}.{name}": value for name, value in getattr(model, tower).named_parameters()}
        wrong = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
        if not wrong:
            return ""
        now, then = (getattr(config.model, tower).name for config in (self.config, self.before))
        names = f"model.{tower}.name {now}, the parent has {then}" if now != then else f"another {now}"
        return f"{names} ({len(wrong)} of {len(own)} tensors differ, such as {wrong[0]})"

    def _check_misfits(self, misfits: dict[str, str]) -> None:
        if self.everything:
            raise ValueError(
                f"{self.given}: {'; '.join(misfits.values())}. Give the parent's tower, or parent.take weights, which "
                "starts at step 0 and leaves a tower that does not fit as the config says"
            )
        if len(misfits) == len(TOWERS):
            raise ValueError(
                f"{self.given}: no tower of it fits: {'; '.join(misfits.values())}. Leave parent.run out, or give one "
                "of its towers"
            )

    def _with_pretrained(self, misfits: dict[str, str]) -> RunConfig:
        """The configuration that builds the towers that do not fit as it says, and the others without their files."""
        model = self.source.model
        towers = {
            tower: getattr(model, tower) if tower in misfits else replace(getattr(model, tower), weights="scratch")
            for tower in TOWERS
        }
        return replace(self.source, model=replace(model, **towers))

    def _note(self, model: PairModel, weights: dict[str, Tensor], misfits: dict[str, str]) -> None:
        """Keep what `restore` needs of a model that is not wrapped yet, and say what was not taken."""
        parameters = dict(model.named_parameters())
        self._shapes = {name: value.shape for name, value in parameters.items()}
        fresh = [name for name in model.state_dict() if name not in self._taken and name not in OWN]
        self._fresh = {name: parameters[name].detach().clone() for name in fresh if name in parameters}
        self.lines += [f"the {tower} tower is as the config says: {why}" for tower, why in misfits.items()]
        if heads := [name for name in fresh if model.branches[name.partition(".")[0]] not in misfits]:
            self.lines.append(f"fresh: {_heads(heads)}")
        if left := [name for name in weights if name not in model.state_dict()]:
            self.lines.append(f"not in this model, left: {_heads(left)}")
        used_up = (
            "init:",
            "model.temperature:",
            *(f"model.{tower}.weights:" for tower in TOWERS if tower not in misfits),
        )
        for line in self.differences:
            without_effect = ", which has no effect on weights that are taken" if line.startswith(used_up) else ""
            self.lines.append(f"differs from its parent in {line}{without_effect}")

    def begin(self, own: TrainState, feed: Feed) -> TrainState:
        """Where the run starts: with everything at the parent's step; with the weights alone where `own` is.

        Raises:
            ValueError: the parent has made all steps of the run already.
        """
        then, step = self.state, self.state.step
        if own.data_hash != then.data_hash:
            self.differences.append(f"data.train: {then.data_hash} -> {own.data_hash}")
        if not self.everything:
            return own
        if step >= feed.steps:
            raise ValueError(
                f"{self.given}: it is at step {step} already, and this run ends at step {feed.steps}: give more "
                "train.steps (or train.epochs), or parent.take weights, which starts at step 0"
            )
        train, data = self.before.train, self.before.data
        # What checkpoints before these two fields were there held: the data, but not their order.
        same = then.data_hash == own.data_hash and (train.seed, data.lanes, data.shuffle_shards) == (
            self.config.train.seed,
            self.config.data.lanes,
            self.config.data.shuffle_shards,
        )
        order = then.order or (feed.order_identity if same else "")
        moved_by = feed.moved_by(step, step + then.moved_by, order, train.global_batch)
        if moved_by is None:
            self.lines.append("data: in another order than the parent's, which starts at its beginning")
        elif own.data_hash != then.data_hash:
            self.lines.append("data: others than the parent's in the same order, from its next sample on")
        else:
            self.lines.append("data: in the parent's order, from its next sample on")
        balance = then.balance if self.config.balance.kind == self.before.balance.kind else {}
        return replace(
            own,
            step=step,
            first_step=step,
            moved_by=-step if moved_by is None else moved_by,
            samples_seen=then.samples_seen,
            updates=then.updates,
            balance=dict(balance),
        )

    def restore(self, engine: Engine, average: WeightAverage) -> None:
        """Put the parent's moments and averages into a prepared engine, which has its weights; a collective."""
        if not self.everything:
            return
        if self.state.updates:
            saved = checkpoint.load_part(self.path, "optimizer")
            moments: dict[str, Tensor] = {}
            fresh: list[str] = []
            learning = {name for name, value in engine.module.named_parameters() if value.requires_grad}
            for name, shape in self._shapes.items():
                if name not in learning:
                    continue
                keys = [f"{name}.{key}" for key in MOMENTS]
                known = name in self._taken and all(key in saved for key in keys)
                moments |= {key: saved[key] if known else torch.zeros(shape) for key in keys}
                fresh += [] if known else [name]
            engine.load_moments(moments, self.state.updates)
            if fresh:
                self.lines.append(f"moments of zero, since the parent has none: {_heads(fresh)}")
        if average.decay and self.before.optim.ema:
            saved = checkpoint.load_part(self.path, "ema")
            average.load({name: value for name, value in saved.items() if name in self._taken} | self._fresh)
        elif average.decay:
            self.lines.append("the moving average starts at the weights, since the parent has none")

    def record(self) -> dict[str, Any]:
        """What train.run.lineage keeps in the run's directory."""
        run = Path(self.config.parent.run)
        tracked = run / RUN_ID
        return {
            "run": str(run.resolve()),
            "step": self.state.step,
            "checkpoint": sha256_of(self.path / checkpoint.HASHES),
            "wandb": tracked.read_text().strip() if tracked.is_file() else "",
            "differences": self.differences,
        }


def _heads(names: Iterable[str]) -> str:
    """Names of parameters, those of one head or tower once, with their number."""
    count: dict[str, int] = {}
    for name in names:
        head = name.partition(".")[0]
        count[head] = count.get(head, 0) + 1
    return ", ".join(f"{head} ({number} tensors)" if number > 1 else head for head, number in count.items())
