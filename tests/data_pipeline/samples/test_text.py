"""What a raw sample says, and caption policies: what may come out, and how often."""

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.config import CaptionConfig
from data_pipeline.samples.image import BadSample
from data_pipeline.samples.text import captions, check_captions, has_several_lines, pick_caption, split

CAPTIONS = ["one", "two", "three"]


def described(**content: object) -> bytes:
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"txt": b" a  red\nheart "}, ["a red heart"]),
        ({"txt": "ein Löwe 🦁".encode()}, ["ein Löwe 🦁"]),
        ({"json": described(caption="one")}, ["one"]),
        ({"json": described(caption=["one", "two"])}, ["one", "two"]),
        ({"json": described(captions=["one", None, "two", "one ", ""])}, ["one", "two"]),
        ({"json": described(captions="one")}, ["one"]),
        ({"json": described(captions=["one", "two"]), "txt": b"zero"}, ["one", "two", "zero"]),
        ({"json": described(caption="of the page", width=3), "txt": b"text"}, ["text", "of the page"]),
        ({"json": described(caption=" text"), "txt": b"text\n"}, ["text"]),
        ({"json": described(captions=["one"], caption="three"), "txt": b"two"}, ["one", "two", "three"]),
        ({"json": described(captions=["one"], caption=["two", "one"]), "txt": b"two"}, ["one", "two"]),
        ({"json": described(caption=7), "txt": b"text"}, ["text"]),
        ({"json": b'{"caption": "cut', "txt": b"text"}, ["text"]),
        ({"json": described(captions=[], caption="one")}, ["one"]),
        ({"json": described(captions=[]), "txt": b"text"}, ["text"]),
        ({"json": b"[1, 2]", "txt": b"text"}, ["text"]),
        ({"json": b'{"caption": "cut \\ud83d"}'}, ["cut ?"]),
        ({"json": b'{"caption": "whole \\ud83e\\udd81"}'}, ["whole 🦁"]),
        ({}, []),
        ({"txt": b" \n"}, []),
        ({"json": described(caption=None)}, []),
        ({"txt": b" \n", "json": described(caption="one")}, ["one"]),
        ({"txt": b"text", "json": described(caption=["one", "two"])}, ["one", "two", "text"]),
        ({"txt": b"text", "json": described(caption=[""])}, ["text"]),
        ({"txt": "\ufefftext".encode()}, ["text"]),
        ({"txt": b"a\nb\r\n\nc\n"}, ["a b c"]),
        ({"txt": b"a\nb\r\n\nc\n", "__captions__": "lines"}, ["a", "b", "c"]),
        ({"json": described(caption="a\nb"), "__captions__": "lines"}, ["a", "b"]),
        ({"json": described(captions=["a\nb", "c"]), "__captions__": "lines"}, ["a", "b", "c"]),
        ({"txt": "\ufeffa\rb\u2028c".encode(), "__captions__": "lines"}, ["a", "b c"]),
    ],
)
def test_captions(raw: dict, expected: list[str]) -> None:
    assert captions(raw) == expected


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        ({"json": b'{"captions": [}'}, "not JSON"),
        ({"json": b"[" * 100_000}, "not JSON"),
        ({"json": described(captions=[7])}, "not text"),
        ({"json": described(captions=[7]), "txt": b"text"}, "not text"),
        ({"json": described(captions={"en": "text"})}, "not text"),
        ({"json": described(caption=7), "txt": b" "}, "not text"),
        ({"json": b'{"captions": [', "txt": b"text"}, "not JSON"),
        ({"txt": b"caf\xe9"}, "txt member is not UTF-8"),
    ],
)
def test_case_09_bad_captions(raw: dict, cause: str) -> None:
    with pytest.raises(BadSample, match=cause):
        captions(raw)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"txt": b"a\nb"}, True),
        ({"txt": b"a\n\n"}, False),
        ({"json": described(captions=["a", "b"])}, False),
        ({}, False),
    ],
)
def test_has_several_lines(raw: dict, expected: bool) -> None:
    assert has_several_lines(raw) is expected


def test_split() -> None:
    with pytest.raises(BadSample, match="no caption"):
        split({"__key__": "k", "jpg": b"image", "cls": b"1"})
    assert split({"__key__": "k", "jpg": b"image", "cls": b"1"}, needs_caption=False) == (b"image", [], "1")
    assert split({"__key__": "k", "jpeg": b"image", "txt": b"text", "cls": b"7\n"}) == (b"image", ["text"], "7")
    assert split({"webp": b"image", "txt": b"text"})[2] is None
    with pytest.raises(BadSample, match=r"no image member .* its members: gif, txt"):
        split({"__key__": "k", "txt": b"text", "gif": b"image"})


def drawn(captions: list[str], config: CaptionConfig, number: int = 3000) -> Counter[str]:
    return Counter(pick_caption(captions, config, random.Random(seed)) for seed in range(number))


def test_first_takes_the_first_and_random_takes_all_alike() -> None:
    assert set(drawn(CAPTIONS, CaptionConfig(sample="first"))) == {"one"}
    counts = drawn(CAPTIONS, CaptionConfig())
    assert set(counts) == set(CAPTIONS) and all(900 < count < 1100 for count in counts.values())


def test_templates_are_used_as_often_as_told() -> None:
    config = CaptionConfig(sample="first", templates=["a drawing of {}", "{}, drawn"], template_probability=0.4)
    counts = drawn(["a {heart}"], config)
    assert set(counts) == {"a {heart}", "a drawing of a {heart}", "a {heart}, drawn"}
    assert 1650 < counts["a {heart}"] < 1950


def test_keywords_are_shuffled_and_dropped_but_never_all() -> None:
    shuffled = drawn(["red, blue, green"], CaptionConfig(shuffle_keywords=True))
    assert len(shuffled) == 6 and min(shuffled.values()) > 400
    dropped = drawn(["red, blue, green"], CaptionConfig(drop_keywords=0.5))
    assert set(dropped) == {"red", "blue", "green", "red, blue", "red, green", "blue, green", "red, blue, green"}
    assert set(drawn(["red, blue"], CaptionConfig(drop_keywords=1.0))) == {"red", "blue"}
    assert set(drawn(["no keywords here"], CaptionConfig(drop_keywords=1.0, shuffle_keywords=True))) == {
        "no keywords here"
    }


keywords = st.lists(st.sampled_from(["red", "a heart", "blue", "sky", "two"]), min_size=1, max_size=5, unique=True)
some_captions = st.lists(keywords.map(", ".join), min_size=1, max_size=4)


@given(some_captions, st.integers(0, 1 << 32), st.booleans(), st.floats(0, 1))
def test_the_same_seed_gives_the_same_words_of_one_caption(
    captions: list[str], seed: int, shuffle: bool, drop: float
) -> None:
    config = CaptionConfig(shuffle_keywords=shuffle, drop_keywords=drop)
    random.seed(seed + 1)
    caption = pick_caption(captions, config, random.Random(seed))
    random.seed(seed + 2)
    assert caption == pick_caption(captions, config, random.Random(seed)), "the global random state plays no part"
    parts = Counter(part.strip() for part in caption.split(",") if part.strip())
    assert any(parts <= Counter(part.strip() for part in given_.split(",")) for given_ in captions)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (CaptionConfig(templates=["no place"]), r"data\.caption\.templates: 'no place'"),
        (CaptionConfig(templates=["{} and {}"]), r"data\.caption\.templates: '\{\} and \{\}'"),
        (CaptionConfig(template_probability=1.5), r"data\.caption\.template_probability is 1\.5"),
        (CaptionConfig(drop_keywords=-0.1), r"data\.caption\.drop_keywords is -0\.1"),
    ],
)
def test_unusable_policies_are_refused_by_name(config: CaptionConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_captions(config)
