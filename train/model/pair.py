"""The pair of towers: from micro-batches to unit vectors in one space, and the temperature.

Shape suffixes: B images or captions, C channels, H height, W width, L tokens, D embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_pipeline.batch import MicroBatch
from data_pipeline.samples.masking import UNMASKED
from data_pipeline.seeds import model_seed
from train.config import ModelConfig, RunConfig
from train.model.image import ImageTower
from train.model.layers import has_dropout
from train.model.norm import convert, not_recording
from train.model.text import TextTower
from train.terms import levels as multiscale
from train.terms import views as self_supervision
from train.terms.levels import LevelHeads, tapped
from train.terms.views import ViewHead, WordHead

# Where SigLIP starts (arXiv 2303.15343, section 3.2): most pairs of a batch are negatives, so the bias is low.
SIGMOID_SCALE, SIGMOID_BIAS = 10.0, -10.0


class PairModel(nn.Module):
    """Image tower, text tower, a projection of each, and the logit scale.

    Args:
        config: both towers, the embedding, the temperature.
        image_size: height and width of the images, in pixels.
        mean, std: of each channel of images scaled to 0..1.
        sigmoid: for the sigmoid loss: a learned logit bias, and SigLIP's initial scale.
        pretrained: False gives fresh weights whatever the config says, for weights that are loaded afterwards.

    log_scale_range: smallest and largest value of log_scales(); whoever updates them keeps them there.

    Raises:
        ValueError: a tower cannot be built, or does not have the width that its lack of a projection asks for.

    A tower that never learns (locked_until -1) takes no gradient and stays in evaluation mode: no dropout, normalized
    by its running statistics. One that learns later has zero gradients until then, whatever engine computes them: a
    parameter without any would stall those that wait for all of them.
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
        multiscale.check(config.multiscale, config.embed_dim)
        self.image_levels: LevelHeads | None = None
        self.text_levels: LevelHeads | None = None
        if config.multiscale.enabled:
            self._add_levels(math.log(scale), sigmoid)
        self_supervision.check(config)
        ssl = config.self_supervision
        self.image_ssl = ViewHead(self.image.width, ssl.hidden, ssl.dim) if ssl.image else None
        self.text_ssl = WordHead(self.text) if ssl.text else None
        for tower in self._locked():
            tower.requires_grad_(False)
        self.step = 0
        for tower, options in ((self.image, config.image), (self.text, config.text)):
            for parameter in tower.parameters() if options.locked_until > 0 else ():
                if parameter.requires_grad:
                    parameter.register_hook(partial(self._zero_until, options.locked_until))
        self.train()

    def _projection(self, tower: str, width: int) -> nn.Module:
        config = self.config
        if getattr(config, tower).projection == "linear":
            return nn.Linear(width, config.embed_dim, bias=config.projection_bias)
        if width != config.embed_dim:
            raise ValueError(
                f"--model.embed_dim {config.embed_dim}: with --model.{tower}.projection none the embedding is as long "
                f"as the features of {getattr(config, tower).name}; set it to {width}"
            )
        return nn.Identity()

    def _add_levels(self, log_scale: float, sigmoid: bool) -> None:
        """Side heads, and what their losses learn: shares, and scales of their own.

        A level's cosines spread less than the top's. With one scale for all, the levels would soften the embedding's.
        """
        config, blank = self.config.multiscale, self.blank_micro_batch()
        self.image_taps = multiscale.image_taps(self.image, config, self.config.image.name)
        self.text_taps = multiscale.text_taps(self.text, config, len(self.image_taps))
        image_widths = multiscale.widths(self.image, self.image_taps, self._normalized(blank.images_BCHW))
        text_widths = multiscale.widths(self.text, self.text_taps, blank.ids_BL, blank.mask_BL)
        self.image_levels = LevelHeads(image_widths, self.config.embed_dim, config)
        self.text_levels = LevelHeads(text_widths, self.config.embed_dim, config)
        count = len(image_widths)
        self.level_log_scales = nn.Parameter(torch.full((count,), log_scale))
        self.level_biases = nn.Parameter(torch.full((count,), SIGMOID_BIAS)) if sigmoid else None
        self.level_logits = nn.Parameter(torch.zeros(count))

    def forward(self, micro_batches: Sequence[MicroBatch], seeds: Sequence[int]) -> dict[str, Tensor]:
        """Each micro-batch through both towers by itself, with its own dropout seed.

        The same seeds give the same features again; the caller's random state stays as it is. With norm sync_batch the
        images of all micro-batches go through the image tower together, after the first one's seed.

        Returns:
            image, text: float32 unit vectors [B, D] of all micro-batches, in order.
            logit_scale: [1], what cosines are multiplied by; with the sigmoid loss logit_bias: [1], what is then added.
            With multiscale, image_levels, text_levels: float32 unit vectors [B, n, D]; level_scales, level_biases: [n],
            as for the embedding; level_shares: [n], the levels' weights, which sum to one.
            With self-supervision, view, other_view: unit vectors of two views of every image; words_loss, words_count:
            [B], the sum of the losses of a caption's hidden words, and their number.
        """
        self.step = micro_batches[0].step
        device = self.mean.device
        together = self.config.image.norm == "sync_batch"
        rows: list[dict[str, Tensor]] = []
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for number, (batch, seed) in enumerate(zip(micro_batches, seeds, strict=True)):
                torch.manual_seed(seed)
                shown = [] if together and number else micro_batches if together else [batch]
                if shown:
                    rows.append(self._image(_joined([each.images_BCHW for each in shown])))
                rows.append(self._text(batch.ids_BL, batch.mask_BL))
                # After the pair, whose dropout is then that of a run without.
                if shown and self.image_ssl is not None:
                    rows.append(self._other_view(_joined([each.views_BCHW for each in shown])))
                if self.text_ssl is not None:
                    rows.append(self._words(batch))
        names = dict.fromkeys(name for part in rows for name in part)
        outputs = {name: torch.cat([part[name] for part in rows if name in part]) for name in names}
        outputs["logit_scale"] = self.log_scale.float().exp()
        if self.logit_bias is not None:
            outputs["logit_bias"] = self.logit_bias.float().clone()
        if self.image_levels is not None:
            outputs["level_scales"] = self.level_log_scales.float().exp()
            outputs["level_shares"] = self.level_logits.float().softmax(0)
            if self.level_biases is not None:
                outputs["level_biases"] = self.level_biases.float().clone()
        return outputs

    def encode_image(self, images_BCHW: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] -> float32 unit vectors [B, D], without side heads that they do not need."""
        if self.config.multiscale.fuse:
            return self._image(images_BCHW)["image"]
        return F.normalize(self.image_projection(self.image(self._normalized(images_BCHW))).float(), dim=-1)

    def encode_text(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Token ids and mask, int64 [B, L] -> float32 unit vectors [B, D], without side heads that they do not need."""
        if self.config.multiscale.fuse:
            return self._text(ids_BL, mask_BL)["text"]
        return F.normalize(self.text_projection(self.text(ids_BL, mask_BL)).float(), dim=-1)

    def _image(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        taps: list[str] = self.image_taps if self.image_levels is not None else []
        levels, features_BD = tapped(self.image, taps, self._normalized(images_BCHW))
        outputs, top_BD = {}, self.image_projection(features_BD)
        if self.image_levels is None:
            outputs["image"] = F.normalize(top_BD.float(), dim=-1)
        else:
            outputs["image"], outputs["image_levels"] = self.image_levels(levels, top_BD)
        if self.image_ssl is not None:
            outputs["view"] = self.image_ssl(features_BD)
        return outputs

    def _other_view(self, views_BCHW: Tensor) -> dict[str, Tensor]:
        assert self.image_ssl is not None
        with not_recording(self.image):
            return {"other_view": self.image_ssl(self.image(self._normalized(views_BCHW)))}

    def _words(self, batch: MicroBatch) -> dict[str, Tensor]:
        assert self.text_ssl is not None and batch.masked_BL is not None, "the loader hides words by its Extras"
        loss_B, count_B = self.text_ssl(self.text.hidden_states(batch.masked_BL, batch.mask_BL), batch.targets_BL)
        return {"words_loss": loss_B, "words_count": count_B}

    def _text(self, ids_BL: Tensor, mask_BL: Tensor) -> dict[str, Tensor]:
        if self.text_levels is None:
            return {"text": self.encode_text(ids_BL, mask_BL)}
        levels, features_BD = tapped(self.text, self.text_taps, ids_BL, mask_BL)
        embedding_BD, levels_BnD = self.text_levels(levels, self.text_projection(features_BD), mask_BL)
        return {"text": embedding_BD, "text_levels": levels_BnD}

    def _normalized(self, images_BCHW: Tensor) -> Tensor:
        # Rearranged while a pixel is one byte.
        images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last).float()
        return (images_BCHW / 255 - self.mean) / self.std

    def log_scales(self) -> list[nn.Parameter]:
        """The parameters that stay within log_scale_range."""
        return [self.log_scale] if self.image_levels is None else [self.log_scale, self.level_log_scales]

    def blank_micro_batch(self, rows: int = 2, tokens: int = 8) -> MicroBatch:
        """A micro-batch of black images with captions of zeros; by default the smallest that goes through the model."""
        ids_BL = torch.zeros(rows, tokens, dtype=torch.int64)
        images_BCHW = torch.zeros(rows, 3, self.image_size, self.image_size, dtype=torch.uint8)
        batch = MicroBatch(images_BCHW, ids_BL, torch.ones_like(ids_BL), index=0, step=0, keys=[""] * rows)
        targets_BL = torch.full_like(ids_BL, UNMASKED)
        targets_BL[:, ::7] = 0  # as many as are hidden in earnest
        return replace(batch, views_BCHW=images_BCHW, masked_BL=ids_BL, targets_BL=targets_BL)

    def train(self, mode: bool = True) -> PairModel:
        """Training or evaluation mode; a tower that never learns stays in evaluation mode."""
        super().train(mode)
        for tower in self._locked():
            tower.eval()
        return self

    def _zero_until(self, step: int, gradient: Tensor) -> Tensor | None:
        return torch.zeros_like(gradient) if self.step < step else None

    def _locked(self) -> list[nn.Module]:
        towers = ((self.image, self.config.image), (self.text, self.config.text))
        return [tower for tower, config in towers if config.locked_until < 0]


def _joined(parts: Sequence[Tensor | None]) -> Tensor:
    given = [part for part in parts if part is not None]
    assert len(given) == len(parts), "the loader makes second views by its Extras"
    return given[0] if len(given) == 1 else torch.cat(given)


def _check_dropout(tower: ImageTower, config: ModelConfig) -> None:
    """A synchronized norm has all images of a process go through together, so that chance falls as they are dealt."""
    if config.image.norm == "sync_batch" and config.image.locked_until >= 0 and has_dropout(tower):
        raise ValueError(
            f"--model.image.norm sync_batch: {config.image.name} has dropout, which would fall otherwise on another "
            "number of processes; take --model.image.norm batch, or a tower without, such as resnet50"
        )


def build_model(config: RunConfig, mean: Sequence[float], std: Sequence[float], pretrained: bool = True) -> PairModel:
    """The model of a run; its fresh weights are a function of train.seed.

    Args:
        mean, std: of each channel of images scaled to 0..1.
        pretrained: False gives fresh weights whatever the config says, for weights that are loaded afterwards.

    Raises:
        ValueError: a tower cannot be built, or captions may be longer than the text tower has positions.
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
    if config.data.max_tokens > model.text.max_tokens:
        raise ValueError(
            f"--data.max_tokens {config.data.max_tokens} is more than the {model.text.max_tokens} positions of "
            f"{config.model.text.name}; set it to at most that"
        )
    return model
