"""The Open Clip Art corpus: public-domain drawings with titles and keywords, out of two Debian packages.

Many titles name a whole collection ("Lemon SVG theme"), and file names carry their author (`tiger_graig_smith_01`): a
title counts where few drawings share it, and a file name without its author and number.
"""

from __future__ import annotations

import io
import re
import shutil
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm

from data_pipeline.demo.corpus import Example, build
from data_pipeline.demo.fetch import debian_packages

PACKAGES = ("openclipart-png", "openclipart-svg")
LEFT_OUT_FOLDERS = ("shapes/stars", "special")
"""1,375 stars that differ in their number of points, and gradients and test pictures."""
SIZE = 256
"""Longest side of the stored pictures in pixels."""
MAX_PIXELS = 30_000_000
SHARED_TITLE = 5
"""A title of more drawings than this is a collection's."""
HELD_OUT = 0.1
"""Share of the concepts that is held out."""
VARIANTS = 8
"""Most drawings of one concept in training."""
ATTRIBUTION = """\
# Where this corpus comes from

Drawings, titles and keywords: Open Clip Art Library 0.18, https://openclipart.org, as packaged by Debian
(openclipart-png, openclipart-svg). Dedicated to the public domain (LICENSE-OPENCLIPART.txt); the few drawings whose
files name the GPL are left out. Changed: reduced to at most 256 pixels a side.

One drawing stands for each held-out concept; others of a held-out concept are in neither part, of those of a training
concept some are kept. corpus.json counts them.
"""

_DC = "{http://purl.org/dc/elements/1.1/}"
_RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
_CREDIT = re.compile(r"^clip ?art by .*? - ")


class Metadata(NamedTuple):
    """What the RDF block of an SVG says."""

    title: str
    keywords: tuple[str, ...]
    people: tuple[str, ...]


def openclipart(out: Path, downloads: Path, limit: int) -> dict[str, Any]:
    """Make the corpus in `out`, of the first `limit` drawings or (0) all. Returns its record (demo_corpus.build)."""

    def examples() -> tuple[list[Example], dict[str, int]]:
        root = debian_packages(PACKAGES, downloads) / "usr" / "share" / "openclipart"
        return read_examples(root, limit)

    def licences(folder: Path) -> None:
        documents = debian_packages(PACKAGES, downloads) / "usr" / "share" / "doc"
        shutil.copy(documents / "openclipart-svg" / "copyright", folder / "LICENSE-OPENCLIPART.txt")
        (folder / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="utf-8")

    recipe = {"version": 2, "sources": list(PACKAGES), "size": SIZE, "limit": limit}
    return build(out, recipe, examples, licences, held_out=HELD_OUT, variants=VARIANTS)


def read_examples(root: Path, limit: int) -> tuple[list[Example], dict[str, int]]:
    """Pictures under `root`/png with the metadata of their `root`/svg, and counts of those left out, by cause."""
    paths, dropped = [], Counter[str]()
    for path in sorted((root / "svg").rglob("*.svg")):
        if path.relative_to(root / "svg").as_posix().startswith(tuple(f"{name}/" for name in LEFT_OUT_FOLDERS)):
            dropped[f"drawings in {' and '.join(LEFT_OUT_FOLDERS)}"] += 1
        else:
            paths.append(path)
    paths = paths[: limit or None]
    texts = {path: path.read_text(encoding="utf-8", errors="replace") for path in paths}
    found = {path: read_metadata(text) for path, text in texts.items()}
    titles = Counter(metadata.title.lower() for metadata in found.values() if metadata)
    made = []
    for path in tqdm(paths, desc="read", unit=" drawings"):
        metadata = found[path]
        name = path.relative_to(root / "svg").with_suffix("")
        image = None
        if metadata is None:
            dropped["drawings without readable metadata"] += 1
        elif re.search(r"\bGPL\b", texts[path]):
            dropped["drawings that name the GPL"] += 1
        elif not (captions := captions_of(name, metadata, titles[metadata.title.lower()])):
            dropped["drawings without a caption"] += 1
        elif (image := reduced(root / "png" / f"{name}.png")) is None:
            dropped[f"pictures that are missing, damaged or over {MAX_PIXELS:,} pixels"] += 1
        else:
            key = re.sub(r"[^\w/-]", "_", name.as_posix())
            made.append(Example(key, captions, "png", image, keys_of(captions), label_of(name)))
    return made, dict(dropped)


def read_metadata(svg: str) -> Metadata | None:
    """Title, keywords and named people of an SVG; None when it has no readable RDF block."""
    block = re.search(r"<(\w+:)?RDF\b.*?</(\w+:)?RDF>", svg, re.DOTALL)
    if block is None:
        return None
    text = block[0]
    # A block may use prefixes that the root element declares; these two are all that is read here.
    opening = text[: text.index(">")]
    for prefix, uri in (("rdf", _RDF[1:-1]), ("dc", _DC[1:-1]), ("cc", "http://web.resource.org/cc/")):
        if f"xmlns:{prefix}=" not in opening:
            text = text.replace("RDF", f'RDF xmlns:{prefix}="{uri}"', 1)
    try:
        rdf = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None
    agents = {title for agent in rdf.iter() if agent.tag.endswith("Agent") for title in agent.iter(f"{_DC}title")}
    titles = (_words(node.text) for node in rdf.iter(f"{_DC}title") if node not in agents)
    keywords = dict.fromkeys(filter(_tells, (_words(item.text) for item in rdf.iter(f"{_RDF}li"))))
    people = dict.fromkeys(filter(None, (_words(node.text).lower() for node in agents)))
    return Metadata(next(filter(None, titles), ""), tuple(keywords), tuple(sorted(people)))


def _tells(keyword: str) -> bool:
    """Whether a keyword says something: "hash" and "0xa0e994c" mark drawings for the library's own sorting."""
    return len(keyword) > 1 and keyword != "hash" and not keyword.startswith("0x")


def _words(text: str | None) -> str:
    return " ".join(re.sub(r"[_\s]+", " ", text or "").split())


def captions_of(name: Path, metadata: Metadata, drawings_with_title: int) -> tuple[str, ...]:
    """The plain caption, and it with the drawing's keywords; empty when there are no words.

    name: path of the drawing without its suffix. The caption is the title, or the file name where that is a
    collection's; numbers at the end and the author's name are no part of it.
    """
    title = _CREDIT.sub("", metadata.title.lower())
    is_collection = (
        not title or drawings_with_title > SHARED_TITLE or re.search(r"\bpart of the\b|\bcollection\b", title)
    )
    plain = _without_author(name.name if is_collection else title, metadata.people)
    folders = [_words(part) for part in reversed(name.parts[:-1]) if part != "unsorted"]
    keywords = [word.lower() for word in (*metadata.keywords, *folders) if word.lower() != plain]
    if not plain:
        plain = keywords.pop(0) if keywords else ""
    if not plain:
        return ()
    return tuple(dict.fromkeys([plain, ", ".join(dict.fromkeys([plain, *keywords]))]))


def _without_author(text: str, people: Iterable[str]) -> str:
    """Words of a title or file name, in lower case, less the author's name and numbers at the end."""
    words = re.sub(r"(?<=[a-z])(?=\d)", " ", _words(re.sub(r"[-_.,:;()]+", " ", text.lower()))).split()
    names = tuple(word for person in people for word in re.findall(r"\w+", person) if len(word) > 1)
    kept = words[:1] + [word for word in words[1:] if not _begins(word, names)]
    while len(kept) > 1 and re.fullmatch(r"\d+|[a-z]", kept[-1]):
        kept.pop()
    return " ".join(kept) if re.search(r"[a-z]{2}", " ".join(kept)) else ""


def _begins(word: str, names: tuple[str, ...]) -> bool:
    """Whether a word is one of the names, or the beginning of one: file names were cut at some length."""
    return word in names or (len(word) > 3 and any(name.startswith(word) for name in names))


def keys_of(captions: tuple[str, ...]) -> frozenset[str]:
    """Key that ties drawings into one concept: the plain caption, singular or plural, without its numbers."""
    words = [word.removesuffix("s") for word in re.findall(r"[^\W\d_]+", captions[0])]
    return frozenset({"caption " + " ".join(words)})


def label_of(name: Path) -> str | None:
    """The class of a picture, for zero-shot classification: the library's top folder in words; None where unsorted."""
    folder = _words(name.parts[0])
    return None if folder == "unsorted" else folder


def reduced(path: Path) -> bytes | None:
    """The PNG at `path` reduced to at most SIZE pixels a side, transparency kept; None when it cannot be used."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as image:
                if image.width * image.height > MAX_PIXELS:
                    return None
                picture = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    # Pillow averages colours as if they were opaque, so weigh them by alpha first ("RGBa").
    picture = picture.convert("RGBa")
    picture.thumbnail((SIZE, SIZE), Image.Resampling.BOX if max(picture.size) > 8 * SIZE else Image.Resampling.LANCZOS)
    data = io.BytesIO()
    picture.convert("RGBA").save(data, "PNG")
    return data.getvalue()
