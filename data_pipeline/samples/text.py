"""Which caption of a sample a training step sees, and in what words."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence

from data_pipeline.config import CaptionConfig
from data_pipeline.samples.image import IMAGE_EXTENSIONS, BadSample


def split(raw: dict) -> tuple[bytes, list[str], str | None]:
    """A raw sample's image bytes, its captions and its class (None without a `cls` member). Raises BadSample."""
    image = next((raw[extension] for extension in IMAGE_EXTENSIONS if extension in raw), None)
    if image is None:
        members = ", ".join(sorted(name for name in raw if not name.startswith("__"))) or "none"
        raise BadSample(f"no image member ({', '.join(IMAGE_EXTENSIONS)}); its members: {members}")
    label = _text(raw["cls"], "cls").strip() if "cls" in raw else None
    return image, captions(raw), label


def captions(raw: dict) -> list[str]:
    """The captions of a raw sample, at least one, white space tidied, repeats left out.

    A list `captions` in the `json` member comes first, then the `txt` member, then `caption` in `json`.
    Raises BadSample where there is none.
    """
    found: list = []
    described = raw.get("json", b"")
    if described and ("txt" not in raw or b'"captions"' in described):
        found = _described(described)
    if not found and "txt" in raw:
        found = [_text(raw["txt"], "txt")]
    if not all(isinstance(text, str) for text in found):
        raise BadSample("a caption in the json member is not text")
    tidy = [" ".join(encodable(text).split()) for text in found]
    kept = list(dict.fromkeys(text for text in tidy if text))
    if not kept:
        raise BadSample("no caption (txt, or json with caption or captions)")
    return kept


def name_bytes(text: str) -> bytes:
    """The bytes that text with names of files or tar members was read from; names need not be UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def encodable(text: str) -> str:
    """The text with a ? for every half of a surrogate pair: JSON can say one ("cut \\ud83d"), UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _described(data: bytes) -> list:
    try:
        content = json.loads(_text(data, "json"))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"the json member is not JSON: {error}") from error
    if not isinstance(content, dict):
        return []
    several, one = content.get("captions"), content.get("caption")
    return [text for text in (several if isinstance(several, list) else [several]) if text is not None] or (
        [text for text in (one if isinstance(one, list) else [one]) if text is not None]
    )


def _text(data: bytes, member: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample(f"the {member} member is not UTF-8: {error}") from error


def check_captions(config: CaptionConfig) -> None:
    """Raises ValueError naming the field of `config` that cannot be used."""
    for template in config.templates:
        if template.count("{}") != 1:
            raise ValueError(f"data.caption.templates: {template!r} needs exactly one {{}} where the caption goes")
    for name in ("template_probability", "drop_keywords"):
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"data.caption.{name} is {value}: a probability from 0 to 1")


def pick_caption(captions: Sequence[str], config: CaptionConfig, rng: random.Random) -> str:
    """One caption made of `captions` (at least one) by the policy, drawn from `rng`."""
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
