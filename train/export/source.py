"""What is exported: the model of one checkpoint, or the mean of several, and all that came with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from train import checkpoint, cli
from train.checkpoint import TrainState
from train.config import RunConfig
from train.model.pair import PairModel
from train.model.text_files import tokenizer_name


@dataclass
class Source:
    """A model in evaluation mode on the CPU, and what its export needs to know."""

    model: PairModel
    tokenizer: Tokenizer
    config: RunConfig
    """As the run was given it."""
    state: TrainState
    """Of the newest checkpoint."""
    run: Path
    """The run's directory."""
    steps: list[int]
    """Of all checkpoints that are in it."""
    averaged: bool
    """Whether the weights are moving averages (`optim.ema`)."""

    @property
    def image_size(self) -> int:
        """Height and width of the images that the export takes, in pixels: those of evaluation."""
        return self.config.data.evaluated_size


def load_source(run: str | Path, step: str = "", soup: Sequence[str] = ()) -> Source:
    """The newest model of a run or that of a step, with averaged weights where the run has them.

    Args:
        run: a run directory.
        step: `best`, or a number of steps.
        soup: several of them, whose weights are averaged alike (model soups, arXiv 2203.05482).

    Raises:
        ValueError: there is no such run or step, or a checkpoint is damaged.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise ValueError(f"run {run}: there is no run (config.yaml) in this directory")
    if soup and (len(soup) < 2 or not all(soup)):
        raise ValueError(f"soup {','.join(soup)}: give two steps or more, such as 1000,2000")
    if step and soup:
        raise ValueError(f"step {step}: give either this or --soup")
    wanted = list(soup) if soup else [step]
    paths = [checkpoint.find(run, each) for each in wanted]
    for path in paths[:-1]:  # loading verifies the last one
        if damage := checkpoint.verify(path):
            raise ValueError(f"soup: {path} is damaged ({damage})")
    model, config = checkpoint.load_model(paths[-1])
    if len(paths) > 1:
        part = "ema" if config.optim.ema > 0 else "model"
        model.load_state_dict(mean_weights([checkpoint.load_part(path, part) for path in paths]))
    tokenizer = Tokenizer(tokenizer_name(config), config.data.max_tokens)
    state, given = checkpoint.load_state(paths[-1]), cli.load(paths[-1] / "config.yaml")
    steps = [checkpoint.load_state(path).step for path in paths]
    return Source(model.eval(), tokenizer, given, state, run, steps, config.optim.ema > 0)


def mean_weights(models: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor over several models; of counts the last model's.

    Raises:
        ValueError: they do not have the same tensors.
    """
    last = models[-1]
    for model in models:
        if {name: tensor.shape for name, tensor in model.items()} != {n: tensor.shape for n, tensor in last.items()}:
            raise ValueError("soup: the checkpoints hold different models, which have no mean")
    means = {}
    for name, tensor in last.items():
        if tensor.is_floating_point():
            tensor = torch.stack([model[name].double() for model in models]).mean(0).to(tensor.dtype)
        means[name] = tensor
    return means
