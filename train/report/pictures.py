"""Pictures of retrieval on held-out data: for a text the nearest images, for an image the nearest texts.

The queries are at even distances in the data; they are not chosen by how well they do.
Shape suffixes: N images, M texts, I items of either kind, D embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from data_pipeline.config import DataConfig
from data_pipeline.order import sequential
from data_pipeline.samples.image import decode_image
from data_pipeline.samples.text import split
from data_pipeline.stages.readers import Readers
from data_pipeline.stages.slots import sample_name
from data_pipeline.storage.manifest import Manifest
from train.evaluation.retrieval import TIE

if TYPE_CHECKING:
    from train.evaluation.encode import Features

QUERIES = 8
NEAREST_IMAGES = 7
NEAREST_TEXTS = 5
WIDTH, MARGIN = 1440, 28
THUMB, GAP = 124, 12
CAPTION_WIDTH = 260
CARD_HEIGHT, CARD_IMAGE = 212, 180

INK, MUTED, LINE, PAPER, PANEL = "#1f2933", "#7b8794", "#e4e7eb", "#ffffff", "#f7f9fb"
RIGHT, RIGHT_PALE, BAR = "#0b8457", "#dff5ea", "#eaeff4"


def nearest(query_D: Tensor, items_ID: Tensor, right_I: Tensor) -> tuple[Tensor, int]:
    """All items from the best on, and the position of the best right one among the wrong ones; ties go to the wrong."""
    scores_I = items_ID.double() @ query_D.double()
    order_I = torch.argsort(scores_I - TIE * right_I, descending=True, stable=True)
    hits_I = right_I[order_I]
    return order_I, 1 + int((~hits_I[: int(hits_I.int().argmax())]).sum())


def draw_galleries(features: Features, manifest: Manifest, config: DataConfig, directory: Path) -> list[Path]:
    """Write gallery_text_to_image.png and gallery_image_to_text.png.

    Raises:
        ValueError: a shard of the held-out data is gone or damaged.
    """
    count = min(QUERIES, len(features.image_ND))
    queries = [round((i + 0.5) * len(features.image_ND) / count - 0.5) for i in range(count)]
    pictures = Pictures(features, manifest, config)
    paths = [directory / "gallery_text_to_image.png", directory / "gallery_image_to_text.png"]
    text_to_image(features, queries, pictures).save(paths[0], optimize=True)
    image_to_text(features, queries, pictures).save(paths[1], optimize=True)
    return paths


class Pictures:
    """The image of a row of the features, read again from its shard."""

    def __init__(self, features: Features, manifest: Manifest, config: DataConfig):
        self.features, self.config = features, config
        self.readers = Readers([manifest], config)
        self.positions = sequential([shard.nsamples for shard in manifest.shards])

    def square(self, row: int, side: int) -> Image.Image:
        """The whole image, on the background, in a square of `side` pixels."""
        image = decode_image(
            split(self._raw(row))[0], max_pixels=self.config.max_pixels, background=self.config.background
        )
        return ImageOps.pad(image, (side, side), Image.Resampling.LANCZOS, color=tuple(self.config.background))

    def _raw(self, row: int) -> dict:
        # Rows leave out the bad samples, so that a row's sample is at its number or somewhat later.
        for position in self.positions[row : row + len(self.features.bad) + 1]:
            raw = self.readers.raw(position.source, position.shard, position.index)
            if sample_name(raw) == self.features.keys[row]:
                return raw
        raise ValueError(f"sample {self.features.keys[row]} is no longer in the held-out data")


def text_to_image(features: Features, queries: Sequence[int], pictures: Pictures) -> Image.Image:
    """One row per text: the text, its nearest images, the right one among them framed, and the right one."""
    row_height, top = THUMB + 34, 78
    canvas, draw = _page(top + row_height * len(queries) + 10)
    strip = MARGIN + CAPTION_WIDTH + 16
    last = WIDTH - MARGIN - THUMB
    draw.text((MARGIN, 30), "Text", INK, _font(21, bold=True))
    draw.text((strip, 30), "Nearest images, best first", INK, _font(21, bold=True))
    draw.text((WIDTH - MARGIN, 30), "Right image", INK, _font(21, bold=True), "ra")
    for number, image in enumerate(queries):
        y = top + number * row_height
        text = int((features.image_of_text_M == image).nonzero()[0])
        right_N = torch.arange(len(features.image_ND), device=features.image_ND.device) == image
        order_N, position = nearest(features.text_MD[text], features.image_ND, right_N)
        draw.line((MARGIN, y - 10, WIDTH - MARGIN, y - 10), LINE, 1)
        lines = _wrap(features.captions[text], _font(20), CAPTION_WIDTH, 3)
        _pill(draw, (MARGIN, y + 4), f"rank {position}", position == 1)
        draw.multiline_text((MARGIN, y + 38), "\n".join(lines), INK, _font(20), spacing=5)
        for place, found in enumerate(order_N[:NEAREST_IMAGES].tolist()):
            _thumb(canvas, pictures.square(found, THUMB), (strip + place * (THUMB + GAP), y), found == image)
        _thumb(canvas, pictures.square(image, THUMB), (last, y), False)
    return canvas


def image_to_text(features: Features, queries: Sequence[int], pictures: Pictures) -> Image.Image:
    """One card per image: the image and its nearest texts from the top, the right ones marked."""
    width = (WIDTH - 3 * MARGIN) // 2
    canvas, draw = _page(MARGIN + (CARD_HEIGHT + 20) * -(-len(queries) // 2) + 8)
    for number, image in enumerate(queries):
        x = MARGIN + (number % 2) * (width + MARGIN)
        y = MARGIN + (number // 2) * (CARD_HEIGHT + 20)
        right_M = features.image_of_text_M == image
        order_M, position = nearest(features.image_ND[image], features.text_MD, right_M)
        draw.rounded_rectangle((x, y, x + width, y + CARD_HEIGHT), 12, PANEL, LINE)
        _thumb(canvas, pictures.square(image, CARD_IMAGE), (x + 16, y + 16), False)
        left = x + CARD_IMAGE + 34
        for place, text in enumerate(order_M[:NEAREST_TEXTS].tolist()):
            line = y + 14 + place * 38
            right = bool(right_M[text])
            if right:
                draw.rounded_rectangle((left - 2, line, x + width - 14, line + 32), 8, RIGHT_PALE)
            font = _font(19, bold=right)
            words = _wrap(features.captions[text], font, x + width - 24 - left - 34, 1)[0]
            draw.text((left + 8, line + 16), "✓" if right else str(place + 1), RIGHT if right else MUTED, font, "lm")
            draw.text((left + 34, line + 16), words, RIGHT if right else INK, font, "lm")
        if position > NEAREST_TEXTS:
            draw.text((x + width - 16, y + CARD_HEIGHT - 5), f"right text: rank {position}", MUTED, _font(15), "rd")
    return canvas


def _page(height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    canvas = Image.new("RGB", (WIDTH, height), PAPER)
    return canvas, ImageDraw.Draw(canvas)


def _thumb(canvas: Image.Image, image: Image.Image, corner: tuple[int, int], right: bool) -> None:
    """Paste with rounded corners and a thin frame; a thick green one marks the right image."""
    x, y = corner
    side = image.width
    mask = Image.new("L", (4 * side, 4 * side), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * side - 1, 4 * side - 1), 40, fill=255)
    canvas.paste(image, corner, mask.resize((side, side), Image.Resampling.LANCZOS))
    draw = ImageDraw.Draw(canvas)
    if right:
        draw.rounded_rectangle((x - 4, y - 4, x + side + 3, y + side + 3), 13, outline=RIGHT, width=5)
    else:
        draw.rounded_rectangle((x, y, x + side - 1, y + side - 1), 10, outline=LINE, width=1)


def _pill(draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, good: bool) -> None:
    """A small rounded label."""
    x, y = corner
    width = draw.textlength(text, _font(16, bold=True)) + 20
    draw.rounded_rectangle((x, y, x + width, y + 27), 13, RIGHT_PALE if good else BAR)
    draw.text((x + 10, y + 13), text, RIGHT if good else MUTED, _font(16, bold=True), "lm")


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """The text in at most `most` lines of at most `width` pixels; an ellipsis ends one that is cut."""
    # No letter is narrower than a pixel, so what is beyond this could not be shown; a caption may be a whole book.
    lines, words = [""], text[: most * width].split()
    for number, word in enumerate(words):
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < most:
            lines.append(word)
        else:
            lines[-1] += " " + " ".join(words[number:])
            break
    return [_elide(line, font, width) for line in lines]


def _elide(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    while line and font.getlength(line + "…") > width:
        line = line[:-1]
    return line.rstrip() + "…"


@cache
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib, so that pictures look the same everywhere."""
    path = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal"))
    return ImageFont.truetype(path, size)
