"""Captions far longer than any tower reads."""

from pathlib import Path

import pytest

from data_pipeline.loader import train_loader
from data_pipeline.order import build_order
from data_pipeline.storage.manifest import load_manifest
from data_pipeline.tokenizer import Tokenizer
from tests.support.loading import BATCH, MICRO, SEED, settings
from tests.support.pictures import tiny_image
from tests.support.tars import write_shards
from tests.support.vocabulary import write_tokenizer


@pytest.mark.slow
def test_case_09_captions_of_a_megabyte_are_trained_on_and_larger_ones_recorded(tmp_path: Path) -> None:
    captions = [
        b"red heart " * 100_000,
        b"x" * 1_000_000,
        "心".encode() * 333_000,
        b'{"captions": ["red heart"%s]}' % (b', "heart"' * 100_000),
        b'{"caption": "%s"}' % (b"heart " * 170_000),
        b"heart " * 700_000,  # over the limit of 4 MiB
        b'{"caption": "%s"}' % (b"heart " * 2_900_000),  # and of 16 MiB
        b"heart",
    ]

    def sample(number: int) -> tuple[str, dict[str, bytes]]:
        text = captions[number]
        return f"{number}", {"png": tiny_image(number), "json" if text.startswith(b"{") else "txt": text}

    manifest = load_manifest(write_shards(tmp_path / "shards", (len(captions),), sample))
    tokenizer = Tokenizer(str(write_tokenizer(tmp_path / "tokenizer")), 24)
    order = build_order([manifest], [1.0], BATCH, 1, SEED, 1)
    chosen = {"seed": SEED, "micro_batch": MICRO, "stop_step": 1}
    seen = list(train_loader(settings(), order, [manifest], tokenizer, **chosen))
    assert {record["key"]: record["cause"] for item in seen for record in item.bad} == {
        "5": "the txt member has 4,200,000 bytes, the limit is 4,194,304",
        "6": "the json member has 17,400,015 bytes, the limit is 16,777,216",
    }
    assert {key[-1] for item in seen for key in item.keys} == set("012347")
    assert max(item.ids_BL.shape[1] for item in seen) <= 24
