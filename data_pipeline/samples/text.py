"""Which caption of a sample a training step sees, and in what words."""

from __future__ import annotations

import random
from collections.abc import Sequence

from data_pipeline.config import CaptionConfig


def check_captions(config: CaptionConfig) -> None:
    """Raises ValueError naming the field of `config` that cannot be used."""
    for template in config.templates:
        if template.count("{}") != 1:
            raise ValueError(f"--data.caption.templates: {template!r} needs exactly one {{}} where the caption goes")
    for name in ("template_probability", "drop_keywords"):
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"--data.caption.{name} is {value}: a probability from 0 to 1")


def pick_caption(captions: Sequence[str], config: CaptionConfig, rng: random.Random) -> str:
    """One caption made of `captions` (at least one) by the policy; all chance comes from `rng`."""
    caption = captions[0] if config.sample == "first" else captions[rng.randrange(len(captions))]
    if config.shuffle_keywords or config.drop_keywords:
        caption = _keywords(caption, config, rng)
    if config.templates and rng.random() < config.template_probability:
        caption = rng.choice(config.templates).replace("{}", caption)
    return caption


def _keywords(caption: str, config: CaptionConfig, rng: random.Random) -> str:
    parts = [part.strip() for part in caption.split(",") if part.strip()]
    if len(parts) < 2:
        return caption
    if config.drop_keywords:
        survivor = rng.randrange(len(parts))  # drawn first, so that every part is as likely to be the last one left
        parts = [part for at, part in enumerate(parts) if at == survivor or rng.random() >= config.drop_keywords]
    if config.shuffle_keywords:
        rng.shuffle(parts)
    return ", ".join(parts)
