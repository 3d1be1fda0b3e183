"""What is exported: the model of one checkpoint, or the mean of several, and all that came with it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch

from data_pipeline.config import DataConfig
from data_pipeline.samples.transforms import eval_transform
from data_pipeline.tokenizer import Tokenizer
from train import checkpoint, cli
from train.checkpoint import TrainState
from train.config import EvalTask, RunConfig
from train.engine.precision import autocast
from train.engine.start import own_device
from train.evaluation import build_task
from train.evaluation.encode import Encoder
from train.evaluation.retrieval import RECALL_AT
from train.export.soup import Tried, Weights, greedy, mean_weights
from train.model.pair import PairModel
from train.model.text_files import own_tokenizer
from train.run.directory import CONFIG


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
    tried: list[Tried] = field(default_factory=list)
    """All checkpoints that a greedy soup has tried; empty where the steps were given."""

    @cached_property
    def identity(self) -> str:
        """A hash of all that embeddings depend on: weights, tokenizer, and how images and captions are prepared."""
        model, data = self.config.model, self.config.data
        parts = [model.image.name, model.image.norm, model.text.pooling, self.tokenizer.identity()]
        digest = hashlib.sha256(json.dumps([*parts, *preparation(data)]).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def image_size(self) -> int:
        """Height and width of the images that the export takes, in pixels: those of evaluation."""
        return self.config.data.evaluated_size


def preparation(data: DataConfig) -> list:
    """What makes a model's inputs of image files and captions, beside the tokenizer."""
    return [data.evaluated_size, data.eval_crop, list(data.background), data.max_tokens]


def load_source(
    run: str | Path, step: str = "", soup: Sequence[str] = (), *, greedily: bool = False, crop: float | None = None
) -> Source:
    """The newest model of a run or that of a step, with averaged weights where the run has them.

    Args:
        run: a run directory.
        step: `best`, or a number of steps.
        soup: several of them, whose weights are averaged alike.
        greedily: average only those of `soup`, or of all checkpoints where it is empty, that help held-out recall.
        crop: `data.eval_crop` of the export; None: as in the run.

    Raises:
        ValueError: there is no such run or step, a checkpoint is damaged, or there is no held-out data to choose by.
    """
    run = Path(run)
    if not (run / CONFIG).is_file():
        raise ValueError(f"run {run}: there is no run (config.yaml) in this directory")
    if soup and (len(soup) < 2 or not all(soup)):
        raise ValueError(f"soup {','.join(soup)}: give two steps or more, such as 1000,2000")
    if step and (soup or greedily):
        raise ValueError(f"step {step}: give either this or --soup")
    if greedily and not soup:
        soup = [str(one) for one in checkpoint.steps(run)] or [""]
    wanted = list(soup) if soup else [step]
    *others, last = [checkpoint.find(run, each) for each in wanted]
    for path in others:  # loading verifies the last one
        if damage := checkpoint.verify(path):
            raise ValueError(f"soup: {path} is damaged ({damage})")
    model, config = checkpoint.load_model(last)
    state, given = checkpoint.load_state(last), cli.load(last / CONFIG)
    paths = {checkpoint.load_state(path).step: path for path in (*others, last)}
    tokenizer = own_tokenizer(model, config)

    def load(step: int) -> Weights:
        return checkpoint.load_part(paths[step], "ema" if config.optim.ema > 0 else "model")

    tried: list[Tried] = []
    if greedily:
        tried = greedy(load, list(paths), HeldOutRecall(model, given, tokenizer, state.precision))
    steps = [one.step for one in tried if one.kept] or list(paths)
    if len(paths) > 1:
        model.load_state_dict(mean_weights(load(step) for step in steps))
    if crop is not None:
        given.data.eval_crop = crop
        eval_transform(given.data)  # raises ValueError
    return Source(model.eval(), tokenizer, given, state, run, steps, config.optim.ema > 0, tried)


class HeldOutRecall:
    """Mean of recall at 1, 5 and 10, both ways, on a run's held-out data, in percent, of a model with given weights.

    Raises:
        ValueError: the run has no held-out data, or it is gone.
    """

    def __init__(self, model: PairModel, config: RunConfig, tokenizer: Tokenizer, precision: str):
        if not config.data.val:
            raise ValueError("soup greedy: the run has no data.val to choose by; list the steps to be averaged instead")
        self.model, self.device = model, own_device()
        self.encoder = Encoder(model, config, tokenizer, autocast=partial(autocast, self.device, precision))
        self.task = build_task(EvalTask(task="retrieval", data=config.data.val))

    def __call__(self, weights: Weights) -> float:
        self.model.load_state_dict(weights)
        self.model.to(self.device)
        self.encoder.forget()
        try:
            metrics = self.task.measure(self.encoder).metrics
        except ValueError as error:
            if "not finite" in str(error):
                return math.nan
            raise
        finally:
            self.model.cpu()
        return sum(metrics[f"{side}_R@{k}"] for side in ("t2i", "i2t") for k in RECALL_AT) / (2 * len(RECALL_AT))
