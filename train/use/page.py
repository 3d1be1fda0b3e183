"""A page of what a search has found, with the pictures in it: one HTML file that can be sent as it is."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from data_pipeline.config import DataConfig
from data_pipeline.embeddings.index import Index
from data_pipeline.embeddings.inputs import Input, TextInput, open_input
from data_pipeline.samples.image import BadSample, decode_square
from data_pipeline.samples.text import split
from data_pipeline.storage.files import read_file, write_atomically
from train.report.frame import framed
from train.report.plots import INK, LINE, MUTED
from train.use.find import Answer, Hit, is_image

SIDE = 224
"""Of a picture, in pixels."""


def write_page(path: Path, index: Index, answers: Sequence[Answer], how: str) -> None:
    """Write the page; a picture that can no longer be read is left blank.

    Raises:
        ValueError: the input of the index is gone or has changed, or the page cannot be written.
    """
    pictures = Samples(open_input(index.about["input"]))
    sections = "".join(_section(answer, pictures) for answer in answers)
    facts = f"{index.directory}, {index.about['model']['path']}, {how}"
    page = framed(answers[0].query, f"{sections}<p>{escape(facts)}</p>", STYLE.substitute(COLOURS))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, page)
    except OSError as error:
        raise ValueError(f"page {path} cannot be written: {error}") from error


class Samples:
    """Pictures of an input's samples, by number."""

    def __init__(self, given: Input):
        self.raw = None if isinstance(given, TextInput) else given.opener(DataConfig())

    def tag(self, sample: int) -> str:
        """The picture as HTML; empty where there is none."""
        if self.raw is None:
            return ""
        try:
            return _tag(split(self.raw(sample), needs_caption=False)[0])
        except (BadSample, ValueError):
            return "<div class=blank></div>"


def _tag(data: bytes) -> str:
    buffer = io.BytesIO()
    decode_square(data, SIDE).save(buffer, "webp", quality=85)
    return f'<img alt="" src="data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _section(answer: Answer, pictures: Samples) -> str:
    asked = _tag(read_file(Path(answer.query))) if is_image(answer.query) else ""
    cards = "".join(_card(hit, pictures) for hit in answer.hits)
    return f"<section><h2>{escape(answer.query)}</h2>{asked}<div class=grid>{cards}</div></section>"


def _card(hit: Hit, pictures: Samples) -> str:
    return (
        f"<figure>{pictures.tag(hit.sample)}<figcaption><b>{hit.rank}</b> {escape(hit.text)}"
        f"<small>{hit.score:.3f} · {escape(hit.key)}</small></figcaption></figure>"
    )


COLOURS = {"ink": INK, "muted": MUTED, "line": LINE, "panel": "#f7f9fb", "paper": "#ffffff"}
STYLE = Template(
    """body { margin: 0; background: $panel; color: $ink; font: 16px/1.45 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 20px 60px; }
h2 { font-size: 24px; margin: 0 0 14px; overflow-wrap: anywhere; }
p, small { color: $muted; overflow-wrap: anywhere; } small { display: block; font-size: 12px; }
section { margin: 0 0 36px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)); gap: 16px; }
figure { margin: 0; background: $paper; border: 1px solid $line; border-radius: 12px; overflow: hidden; }
img, .blank { display: block; width: 100%; aspect-ratio: 1; } section > img { width: 180px; margin-bottom: 14px; }
figcaption { padding: 10px 12px; font-size: 14px; } b { color: #0b8457; }
"""
)
