"""The pair of towers: from micro-batches to unit vectors in one space, and the temperature.

Shape suffixes: B images or captions, C channels, H height, W width, L tokens, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.batch import MicroBatch
from data_pipeline.seeds import model_seed
from train import terms
from train.config import ModelConfig, RunConfig
from train.model import depthwise
from train.model.backbone import check_eval_size
from train.model.image import ImageTower
from train.model.layers import has_dropout, mlp
from train.model.norm import convert, record
from train.model.text import TextTower, in_pieces
from train.terms.base import Encoded, Term
from train.terms.taps import tapped

# Where SigLIP starts (arXiv 2303.15343, section 3.2): most pairs of a batch are negatives, so the bias is low.
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0

PROGRAMS = 256
"""torch.compile gives up on a tower after so many shapes; captions of 2,048 tokens have as many lengths."""


class PairModel(nn.Module):
    """Image tower, text tower, a projection of each, the logit scale, and the heads of the terms of the loss.

    Args:
        config: both towers, the embedding, the temperature, the terms.
        image_size: height and width of the images, in pixels.
        mean, std: of each channel of images scaled to 0..1.
        sigmoid: for the sigmoid loss: a learned logit bias, and SigLIP's initial scale.
        pretrained: False gives fresh weights whatever the config says, for weights that are loaded afterwards.

    Attributes:
        log_scale_range: smallest and largest value of log_scales(); whoever updates them keeps them there.
        branches: for each direct child and parameter, the branch with which it learns: image, text or shared.

    Raises:
        ValueError: a tower cannot be built, or has no projection and features that are not model.embed_dim long.

    A tower that never learns (locked_until -1) takes no gradient and stays in evaluation mode: no dropout, normalized
    by its running statistics. One that learns later has zero gradients until then, not none: engines wait for the
    gradient of every parameter.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        config: ModelConfig,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        sigmoid: bool = False,
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        terms.check(config)
        self.config = config
        self.image_size = image_size
        self.image = ImageTower(config.image, image_size, pretrained)
        _check_dropout(self.image, config)
        convert(self.image, config.image.norm)
        self.text = TextTower(config.text, pretrained)
        self.image_projection = self._projection("image", self.image.width)
        self.text_projection = self._projection("text", self.text.width)
        scale = SIGMOID_SCALE if sigmoid else 1 / config.temperature
        # Shape [1]: DeepSpeed fails on parameters without dimensions.
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.log_scale_range = (0.0, math.log(config.max_logit_scale))
        self.logit_bias = nn.Parameter(torch.tensor([SIGMOID_BIAS])) if sigmoid else None
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(list(values), dtype=torch.float32).view(1, 3, 1, 1))
        self.branches = {"image": "image", "image_projection": "image", "text": "text", "text_projection": "text"}
        self.branches |= {"log_scale": "shared", "logit_bias": "shared"}
        self.terms = terms.enabled(config)
        for term in self.terms:
            self._add_heads(term)
        for tower in self._locked():
            tower.requires_grad_(False)
        depthwise.convert(self.image)
        self.step = 0
        self.compiled: dict[str, Any] = {}  # no child modules: their names would be in checkpoints
        for tower, options in ((self.image, config.image), (self.text, config.text)):
            for parameter in tower.parameters() if options.locked_until > 0 else ():
                if parameter.requires_grad:
                    parameter.register_hook(partial(self._zero_before, options.locked_until))
        self.train()

    def _projection(self, tower: str, width: int) -> nn.Module:
        config = self.config
        if getattr(config, tower).projection == "linear":
            return nn.Linear(width, config.embed_dim, bias=config.projection_bias)
        if getattr(config, tower).projection == "mlp":
            return mlp(width, 2 * config.embed_dim, config.embed_dim, bias=config.projection_bias)
        if width != config.embed_dim:
            raise ValueError(
                f"model.embed_dim {config.embed_dim}: with model.{tower}.projection none the embedding is as long "
                f"as the features of {getattr(config, tower).name}; set it to {width}"
            )
        return nn.Identity()

    def _add_heads(self, term: Term) -> None:
        """Registers the heads of a term under their own names, which are their names in checkpoints."""
        for branch, heads in term.heads(self).items():
            for name, head in heads.items():
                assert not hasattr(self, name), (
                    f"{type(term).__name__} names a head {name}, which the model has already"
                )
                setattr(self, name, head)
                self.branches[name] = branch

    def forward(self, micro_batches: Sequence[MicroBatch], seeds: Sequence[int]) -> dict[str, Tensor]:
        """Each micro-batch through both towers by itself, with its own dropout seed.

        The same seeds give the same features again; the caller's random state stays as it is. With norm sync_batch the
        images of all micro-batches go through the image tower together, with the first one's seed.

        Returns:
            image, text: float32 unit vectors [B, D] of all micro-batches, in order.
            logit_scale: [1], what cosines are multiplied by; with the sigmoid loss logit_bias: [1], what is then added.
            And the outputs of the terms, which their classes name: of all micro-batches, in order, or `scalars`.
        """
        self.step = micro_batches[0].step
        device = self.mean.device
        all_at_once = self.config.image.norm == "sync_batch"
        parts: list[dict[str, Tensor]] = []
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for number, (batch, seed) in enumerate(zip(micro_batches, seeds, strict=True)):
                torch.manual_seed(seed)
                # Else they would all read one copy of each weight in bf16, and autograd add up their gradients in bf16.
                torch.clear_autocast_cache()
                if not all_at_once:
                    with_images = [batch]
                else:
                    with_images = [] if number else list(micro_batches)
                if with_images:
                    parts.append(self._image([each.images_BCHW for each in with_images], self.terms))
                parts.append(self._text(batch.ids_BL, batch.mask_BL, self.terms, batch.lengths))
                for term in self.terms:
                    if with_images:
                        parts.append(term.after_images(self, with_images))
                    parts.append(term.after_text(self, batch))
        names = dict.fromkeys(name for part in parts for name in part)
        outputs = {name: torch.cat([part[name] for part in parts if name in part]) for name in names}
        outputs["logit_scale"] = self.log_scale.float().exp()
        if self.logit_bias is not None:
            outputs["logit_bias"] = self.logit_bias.float().clone()
        for term in self.terms:
            outputs |= term.scalar_outputs(self)
        return outputs

    def encode_image(self, images_BCHW: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] -> float32 unit vectors [B, D], without the heads that they do not need.

        Raises:
            ValueError: the images are not uint8.
        """
        if images_BCHW.dtype != torch.uint8:
            raise ValueError(
                f"encode_image expects uint8 pixels from 0 to 255, not {images_BCHW.dtype}: give "
                f"{_to_uint8(images_BCHW)}; it scales and normalizes them itself"
            )
        return self._image([images_BCHW], [term for term in self.terms if term.changes_embedding])["image"]

    def encode_text(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Token ids and mask, int64 [B, L] -> float32 unit vectors [B, D], without the heads that they do not need."""
        return self._text(ids_BL, mask_BL, [term for term in self.terms if term.changes_embedding])["text"]

    def _image(self, parts: Sequence[Tensor], wanted: Sequence[Term]) -> dict[str, Tensor]:
        taps = [name for term in wanted for name in term.taps(self, "image")]
        positions, features_BD = tapped(self._tower("image"), taps, self.normalized(_joined(parts)))
        record(self.image)
        outputs = {"image": F.normalize(self.image_projection(features_BD).float(), dim=-1)}
        for term in wanted:
            outputs |= term.from_image(self, Encoded(outputs["image"], features_BD, positions))
        return outputs

    def _text(
        self, ids_BL: Tensor, mask_BL: Tensor, wanted: Sequence[Term], lengths: Sequence[int] = ()
    ) -> dict[str, Tensor]:
        taps = [name for term in wanted for name in term.taps(self, "text")]
        tower, pieces = self._tower("text"), self.config.text.pieces
        positions: dict[str, Tensor] = {}
        if lengths and pieces > 1 and not taps:
            features_BD = in_pieces(tower, pieces, ids_BL, mask_BL, lengths)
        else:
            positions, features_BD = tapped(tower, taps, ids_BL, mask_BL)
        outputs = {"text": F.normalize(self.text_projection(features_BD).float(), dim=-1)}
        for term in wanted:
            outputs |= term.from_text(self, Encoded(outputs["text"], features_BD, positions, mask_BL))
        return outputs

    def other_image_features(self, parts: Sequence[Tensor]) -> Tensor:
        """Other uint8 images [B, 3, H, W] than the pairs' -> the tower's features; not seen by running statistics."""
        return self.image(self.normalized(_joined(parts)))

    def normalized(self, images_BCHW: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] -> what the image tower takes: float, normalized, in channels_last memory."""
        # Rearranged while a pixel is one byte.
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last).float()
        return (images_BCHW / 255 - self.mean) / self.std

    def compile_towers(self, backend: str = "inductor") -> None:
        """From now on training passes go through torch.compile's programs of the towers; evaluation does not.

        A program is made for each shape, whatever came before, so that rounding is a function of the micro-batch.

        Raises:
            ValueError: a term of the loss reads what layers inside of a tower put out.
        """
        for term in self.terms:
            if any(term.taps(self, tower) for tower in ("image", "text")):
                raise ValueError(
                    f"train.compile true: {type(term).__name__} reads layers inside of the towers, which a compiled "
                    "tower does not show; set train.compile to false, or leave that term out"
                )
        import torch._dynamo.config as dynamo

        dynamo.recompile_limit = max(dynamo.recompile_limit, PROGRAMS)
        dynamo.optimize_ddp = False  # else DDP has programs cut at its buckets, and one process has others
        self.compiled = {
            name: torch.compile(getattr(self, name), dynamic=False, backend=backend) for name in ("image", "text")
        }

    def _tower(self, name: str) -> nn.Module:
        return self.compiled.get(name, getattr(self, name)) if self.training else getattr(self, name)

    def log_scales(self) -> list[nn.Parameter]:
        """The parameters that stay within log_scale_range."""
        return [self.log_scale, *(scale for term in self.terms for scale in term.log_scales(self))]

    def blank_micro_batch(self, rows: int = 2, tokens: int = 8) -> MicroBatch:
        """A micro-batch of black images with captions of zeros; by default the smallest that goes through the model."""
        ids_BL = torch.zeros(rows, tokens, dtype=torch.int64)
        images_BCHW = torch.zeros(rows, 3, self.image_size, self.image_size, dtype=torch.uint8)
        batch = MicroBatch(images_BCHW, ids_BL, torch.ones_like(ids_BL), index=0, step=0, keys=[""] * rows)
        for term in self.terms:
            batch = replace(batch, **term.blank_inputs(batch))
        return batch

    def train(self, mode: bool = True) -> PairModel:
        """Training or evaluation mode; a tower that never learns stays in evaluation mode."""
        super().train(mode)
        for tower in self._locked():
            tower.eval()
        return self

    def _zero_before(self, step: int, gradient: Tensor) -> Tensor | None:
        """The hook of a parameter that starts to learn at `step`."""
        return torch.zeros_like(gradient) if self.step < step else None

    def _locked(self) -> list[nn.Module]:
        towers = ((self.image, self.config.image), (self.text, self.config.text))
        return [tower for tower, config in towers if config.locked_until < 0]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _to_uint8(images: Tensor) -> str:
    """How a caller makes uint8 images of what it has."""
    low, high = float(images.min()), float(images.max())
    if images.is_floating_point() and low >= 0 and high <= 1:
        return "(255 * images).round().to(torch.uint8)"
    if low >= 0 and high <= 255:
        return "images.to(torch.uint8)"
    return f"the pixels as decoded, not values from {low:g} to {high:g}"


def _check_dropout(tower: ImageTower, config: ModelConfig) -> None:
    """With a synchronized norm all images of a rank go through together, so dropout depends on how many there are."""
    if config.image.norm == "sync_batch" and config.image.locked_until >= 0 and has_dropout(tower):
        raise ValueError(
            f"model.image.norm sync_batch: {config.image.name} has dropout, which would differ with the number of "
            "processes; take model.image.norm batch, or a tower without dropout, such as resnet50"
        )


def build_model(config: RunConfig, mean: Sequence[float], std: Sequence[float], pretrained: bool = True) -> PairModel:
    """The model of a run; its fresh weights are a function of train.seed.

    Args:
        mean, std: of each channel of images scaled to 0..1.
        pretrained: False gives fresh weights whatever the config says, for weights that are loaded afterwards.

    Raises:
        ValueError: a tower cannot be built, the image tower does not take images as large as evaluation's, or captions
            may be longer than the text tower has positions.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model_seed(config.train.seed))
        model = PairModel(
            config.model,
            config.data.image_size,
            mean,
            std,
            sigmoid=config.loss.kind == "sigmoid",
            pretrained=pretrained,
        )
    if config.data.evaluated_size != config.data.image_size:
        check_eval_size(model.image.backbone, config.data.evaluated_size, config.model.image.name)
    if config.data.max_tokens > model.text.max_tokens:
        raise ValueError(
            f"data.max_tokens {config.data.max_tokens} is more than the {model.text.max_tokens} positions of "
            f"{config.model.text.name}; set it to at most that"
        )
    return model
