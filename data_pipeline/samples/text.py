"""The captions of a sample; which of them a training step sees, and in what words."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from typing import Any

from data_pipeline.config import CaptionConfig
from data_pipeline.samples.image import BadSample
from data_pipeline.samples.limits import IMAGE_EXTENSIONS, MOST_BYTES

CAPTIONS = "__captions__"
"""Key of a raw sample: how its data set's manifest says that a text of several lines is read; without it, WHOLE."""
WHOLE, LINES = "whole", "lines"
"""One caption each, or every line a caption of its own (as CLIP_benchmark writes retrieval sets)."""
READ_AS = {WHOLE: "one caption", LINES: "a caption for each line"}
"""In words."""
_LISTED = re.compile(rb'"captions"|"caption"\s*:\s*\[')


def split(raw: dict, *, needs_caption: bool = True) -> tuple[bytes, list[str], str | None]:
    """A raw sample's image bytes, its captions and its class (None without a `cls` member).

    Raises BadSample; for a sample without captions only where they are needed.
    """
    name = next((extension for extension in IMAGE_EXTENSIONS if extension in raw), None)
    if name is None:
        members = ", ".join(sorted(name for name in raw if not name.startswith("__"))) or "none"
        raise BadSample(f"no image member ({', '.join(IMAGE_EXTENSIONS)}); its members: {members}")
    image = _read(raw[name], name)
    label = _text(raw["cls"], "cls").strip() if "cls" in raw else None
    texts = captions(raw)
    if needs_caption and not texts:
        raise BadSample("no caption (txt, or json with caption or captions)")
    return image, texts, label


def captions(raw: dict) -> list[str]:
    """All captions of a raw sample, white space tidied, empty ones and repeats left out.

    In this order: lists `captions` and `caption` in the `json` member, the `txt` member, a text `caption` in `json`.
    Raises BadSample for what is no text.
    """
    found = _found(raw)
    if raw.get(CAPTIONS) != LINES:
        return tidied(found)
    by_line = {tuple(tidied([text])): lines_of(text) for text in found if len(lines_of(text)) > 1}
    # A text that is there again on one line, as in a json beside a txt, is what its lines say.
    return tidied(line for text in found for line in by_line.get(tuple(tidied([text])), [text]))


def has_several_lines(raw: dict) -> bool:
    """Whether the captions depend on how a text of several lines is read. Raises BadSample."""
    return any(len(lines_of(text)) > 1 for text in _found(raw))


def lines_of(text: str) -> list[str]:
    """The lines of a text that are not empty."""
    if "\n" not in text and "\r" not in text:  # as nearly always; in an eighth of the time
        return [text] if text.strip() else []
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


def tidied(texts: Iterable[str]) -> list[str]:
    """Each text on one line, white space tidied; empty ones and repeats left out."""
    return list(dict.fromkeys(filter(None, (" ".join(encodable(text).split()) for text in texts))))


def _found(raw: dict) -> list[str]:
    """All texts of a raw sample, in the order of `captions`, as they are."""
    written = [_text(raw["txt"], "txt")] if "txt" in raw else []
    described = raw.get("json", b"")
    if not described:
        return written
    try:
        listed, single = _described(described)
    except BadSample:
        # Beside a text the json member may be anything, unless it was to list captions.
        if isinstance(described, int) or _LISTED.search(described) or not "".join(written).strip():
            raise
        return written
    return [*listed, *written, *single]


def name_bytes(text: str) -> bytes:
    """The bytes that text with names of files or tar members was read from; names need not be UTF-8."""
    return text.encode("utf-8", "surrogateescape")


def encodable(text: str) -> str:
    """The text with a ? for every half of a surrogate pair: JSON can say one ("cut \\ud83d"), UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _described(data: bytes | int) -> tuple[list[str], list[str]]:
    """The captions that the json member lists, and the one that it has as a single text. Raises BadSample."""
    try:
        content = json.loads(_text(data, "json"))
    except (ValueError, RecursionError) as error:
        raise BadSample(f"the json member is not JSON: {error}") from error
    listed: list[Any] = []
    single: list[Any] = []
    if isinstance(content, dict):
        for name, others in (("captions", listed), ("caption", single)):
            value = content.get(name)
            found, of = (value, listed) if isinstance(value, list) else ([value], others)
            of += [text for text in found if text is not None]
    if not all(isinstance(text, str) for text in listed + single):
        raise BadSample("a caption in the json member is not text")
    return listed, single


def _read(data: bytes | int, member: str) -> bytes:
    """The content of a member; an int is the size of one that was not read, as it is over the limit."""
    if isinstance(data, int):
        raise BadSample(f"the {member} member has {data:,} bytes, the limit is {MOST_BYTES[member]:,}")
    return data


def _text(data: bytes | int, member: str) -> str:
    try:
        return _read(data, member).decode("utf-8-sig")
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
