"""Held-out images that are training images, too."""

from dataclasses import replace

import numpy as np

from data_pipeline import overlap as module
from data_pipeline.overlap import overlap, warnings
from data_pipeline.storage.manifest import load_manifest
from tests.support.small import picture, write_data


def shifted(number: int) -> bytes:
    return picture(number + 7)


def test_images_are_found_whatever_their_key_and_shard(tmp_path):
    train = [load_manifest(write_data(tmp_path / "a", (6, 4))), load_manifest(write_data(tmp_path / "b", (3,)))]
    held_out = load_manifest(write_data(tmp_path / "val", (5,), draw=shifted))  # pictures 7 to 11, keys 0 to 4
    assert overlap(train, held_out) == 3, "7, 8 and 9 are in the first set"
    assert overlap(train[1:], held_out) == 0, "equal keys alone are no overlap"
    assert overlap(train, train[1]) == 3, "a shard of both"


def test_no_more_images_are_read_than_a_start_has_time_for(tmp_path, monkeypatch):
    train, held_out = (load_manifest(write_data(tmp_path / name, (6,), draw=lambda _: picture(1))) for name in "ab")
    other = load_manifest(write_data(tmp_path / "c", (6,), draw=lambda _: picture(1), classes=False))
    read = []
    hashed = module._hash
    monkeypatch.setattr(module, "_hash", lambda *image: read.append(image) or hashed(*image))
    monkeypatch.setattr(module, "MOST_READ", 4)
    assert overlap([train], held_out) == 6 and not read, "the same shard"
    assert overlap([train], other) == 4, "at least so many"
    assert len(read) == 8, "4 of either side"


def test_an_overlap_is_a_line_for_each_evaluation(tmp_path):
    train = [load_manifest(write_data(tmp_path / "a", (6, 4)))]
    held_out = load_manifest(write_data(tmp_path / "val", (5,), draw=shifted))
    lines = warnings(train, {"val": held_out, "again": held_out})
    assert [line.partition(" are training")[0] for line in lines] == [
        f"warning: 3 of the 5 images of {name}" for name in ("val", "again")
    ]
    assert warnings([], {"val": held_out}) == []


def test_two_selections_of_one_shard_share_what_both_select(tmp_path):
    whole = load_manifest(write_data(tmp_path / "a", (6,)))
    first, second = (replace(whole, shards=whole.select(np.isin(range(6), own))) for own in ([0, 1, 2], [2, 3, 4, 5]))
    assert overlap([first], second) == 1 and overlap([whole], second) == 4 and overlap([whole], whole) == 6
