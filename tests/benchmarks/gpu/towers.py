"""The towers that are measured: ResNet-50 at 224 pixels and BERT-base with fresh weights, in Duet's engine and bare."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models
from transformers import BertConfig, BertModel

from data_pipeline.batch import MicroBatch
from tests.benchmarks.batches import random_batch
from tests.benchmarks.gpu.bench import Bench
from tests.support.bert import write_bert
from train.config import RunConfig
from train.engine.base import Engine
from train.engine.build import engine_of_run
from train.engine.optim import set_lrs
from train.engine.precision import autocast
from train.engine.start import start
from train.model.pair import build_model

MEAN_TOKENS, SPREAD = 22.0, 0.5
"""Of captions' lengths: a logarithmic normal distribution, about as captions of the web have it."""
STATISTICS = ((0.5,) * 3, (0.25,) * 3)
DIFFERENT = 4
"""Micro-batches of a step that differ; a larger share repeats them, which takes no longer and saves making them."""


class Shape(NamedTuple):
    """Pairs of a micro-batch, micro-batches of the step, and how many of them keep their activations."""

    micro: int
    share: int
    resident: int

    def __str__(self) -> str:
        return f"{self.micro} x {self.share}, {self.resident} resident"


def make_config(bench: Bench) -> RunConfig:
    """The original recipe's towers; or, to try the script, the smallest that have BatchNorm and dropout."""
    config = RunConfig()
    config.model.text.name, config.model.text.weights = "bert-base-uncased", "scratch"
    if bench.tiny:
        config.data.image_size, config.model.image.name, config.model.embed_dim = 32, "resnet18", 32
        config.model.text.name = write_bert(bench.path.with_suffix(".bert"), width=32)
    return config


def make_engine(config: RunConfig, precision: str, nhwc: bool = False) -> Engine:
    """On this machine's GPU, or the CPU where it has none.

    Args:
        precision: bf16 or fp32.
        nhwc: weights of convolutions in channels_last memory.
    """
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if precision == "bf16" else "no"
    os.environ["ACCELERATE_USE_CPU"] = str(not torch.cuda.is_available()).lower()
    model = build_model(config, *STATISTICS)
    if nhwc:
        model.image.to(memory_format=torch.channels_last)
    engine = engine_of_run(start(), model, config)
    set_lrs(engine.optimizer, 0, 10_000, config.optim)  # the lowest rate: weights stay such as nobody minds
    return engine


def make_step(config: RunConfig, shape: Shape, ragged: bool, device: torch.device) -> list[MicroBatch]:
    """One process's step, on its device; sets the batch of `config`.

    Args:
        ragged: captions of MEAN_TOKENS on average, padded to the longest of their micro-batch, a multiple of 8 tokens,
            as the loader does it; else all are as long as they may be.
    """
    train, tokens = config.train, config.data.max_tokens
    train.micro_batch, train.resident = shape.micro, shape.resident
    train.global_batch = shape.micro * min(shape.share, DIFFERENT)
    generator = torch.Generator().manual_seed(0)
    different = []
    for batch in random_batch(config):
        if ragged:
            lengths_B = caption_lengths(shape.micro, tokens, generator)
            longest = -(-int(lengths_B.max()) // 8) * 8
            mask_BL = (torch.arange(longest) < lengths_B[:, None]).long()
            ids_BL = F.pad(batch.ids_BL, (0, max(0, longest - tokens)))[:, :longest] * mask_BL
            batch = replace(batch, ids_BL=ids_BL, mask_BL=mask_BL)
        rows_B = torch.arange(shape.micro) + shape.micro * batch.index
        lengths = batch.mask_BL.sum(1).tolist()
        different.append(replace(batch, lengths=lengths, image_ids_B=rows_B, text_ids_B=rows_B).to(device))
    train.global_batch = shape.micro * shape.share
    return [replace(different[index % len(different)], index=index) for index in range(shape.share)]


def caption_lengths(count: int, most: int, generator: torch.Generator) -> Tensor:
    """int64 [count], in tokens, start and end included."""
    mean = torch.tensor(MEAN_TOKENS).log() - SPREAD**2 / 2
    lengths = (mean + SPREAD * torch.randn(count, generator=generator)).exp()
    return lengths.round().long().clamp(4, most)


def lengths_of(batches: list[MicroBatch]) -> list[int]:
    """Tokens of each caption."""
    return torch.cat([batch.mask_BL.sum(1) for batch in batches]).tolist()


class Bare(nn.Module):
    """The same towers as torchvision and transformers have them, each with its projection, and the temperature."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        name = config.model.text.name
        bert = BertConfig.from_pretrained(name) if Path(name).is_dir() else BertConfig()
        bert._attn_implementation = "sdpa"
        self.image = getattr(models, config.model.image.name)(weights=None)
        self.image.fc = nn.Linear(self.image.fc.in_features, config.model.embed_dim, bias=False)
        self.text = BertModel(bert, add_pooling_layer=False)
        self.projection = nn.Linear(bert.hidden_size, config.model.embed_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(1 / config.model.temperature).log())
        for name, values in zip(("mean", "std"), STATISTICS, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, batch: MicroBatch) -> Tensor:
        """The symmetric cross-entropy of one micro-batch by itself."""
        images = batch.images_BCHW.contiguous(memory_format=torch.channels_last).float()
        image_BD = F.normalize(self.image((images / 255 - self.mean) / self.std).float(), dim=-1)
        hidden_BLD = self.text(input_ids=batch.ids_BL, attention_mask=batch.mask_BL).last_hidden_state
        text_BD = F.normalize(self.projection(hidden_BLD[:, 0]).float(), dim=-1)
        logits = self.log_scale.exp() * image_BD @ text_BD.T
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class BareRun:
    """What a plain loop does: forward, loss and backward of each micro-batch by itself, and one update of AdamW."""

    def __init__(self, config: RunConfig, precision: str, device: torch.device) -> None:
        self.precision, self.device = precision, device
        self.model = Bare(config).to(device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def step(self, batches: list[MicroBatch]) -> None:
        for batch in batches:
            with autocast(self.device, self.precision):
                loss = self.model(batch)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
