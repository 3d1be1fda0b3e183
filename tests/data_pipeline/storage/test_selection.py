"""A manifest of some samples of its shards: written, loaded, refused, and read as if the others were not there."""

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.__main__ import main
from data_pipeline.loader import eval_loader, train_loader
from data_pipeline.order import build_order
from data_pipeline.storage.manifest import Manifest, load_manifest, write_manifest
from data_pipeline.storage.selection import Selection
from data_pipeline.storage.shards import ShardReader
from data_pipeline.tokenizer import Tokenizer
from tests.support.loading import BATCH, LANES, MICRO, SEED, settings
from tests.support.tars import contents
from tests.support.vocabulary import write_tokenizer

SIZES = (9, 3, 20, 8)
DROPPED = {0, 4, 9, 10, 11, 25, 39}  # all of the second shard, and the ends


def select(directory: Path, dropped: set[int] = DROPPED) -> Manifest:
    """The manifest `some.json` beside the shards, without these samples."""
    whole = load_manifest(directory)
    kept = ~np.isin(np.arange(whole.nsamples), list(dropped))
    write_manifest(directory / "some.json", whole.select(kept), {}, whole.captions)
    return load_manifest(directory / "some.json")


def keys(manifest: Manifest) -> list[str]:
    return [key for shard in manifest.shards for key, _ in contents(shard.url, shard)]


def test_a_selection_is_loaded_as_it_was_written_and_only_its_samples_are_read(tiny_shards):
    directory = tiny_shards(SIZES)
    whole, some = load_manifest(directory), select(directory)
    assert [shard.nsamples for shard in some.shards] == [7, 19, 7], "a shard of which nothing is left is not in it"
    assert keys(some) == [key for number, key in enumerate(keys(whole)) if number not in DROPPED]
    assert json.loads(Path(some.path).read_text())["__kind__"] != "wids-shard-index-v1", "others would read all of it"
    less = replace(some, shards=some.select(np.arange(some.nsamples) % 2 == 0))
    assert keys(less) == keys(some)[::2], "a selection of a selection"
    assert some.select(np.ones(some.nsamples, bool)) == some.shards


def test_which_samples_are_selected_is_part_of_the_identity(tiny_shards):
    directory = tiny_shards(SIZES)
    whole, some, other = load_manifest(directory), select(directory), select(directory, {1, 5, 9, 10, 11, 25, 39})
    assert len({whole.hash, some.hash, other.hash}) == 3
    assert [shard.nsamples for shard in some.shards] == [shard.nsamples for shard in other.shards]
    assert replace(whole, shards=whole.select(np.ones(whole.nsamples, bool))).hash == whole.hash


def test_it_trains_in_the_exact_order_of_its_samples_on_any_number_of_ranks(tiny_shards, tmp_path):
    some, tokenizer = select(tiny_shards(SIZES)), Tokenizer(str(write_tokenizer(tmp_path)), 24)
    order = build_order([some], [1.0], BATCH, LANES, SEED, 2)
    given = {"seed": SEED, "micro_batch": MICRO}

    def steps(first, last, world=1):
        config = settings(workers=0)
        parts = [
            list(
                train_loader(
                    config, order, [some], tokenizer, rank=rank, world=world, start_step=first, stop_step=last, **given
                )
            )
            for rank in range(world)
        ]
        share = BATCH // MICRO // world
        return [one for step in range(last - first) for part in parts for one in part[step * share :][:share]]

    plain = steps(0, 8)
    for world, again in ((2, steps(0, 8, 2)), (4, steps(0, 8, 4)), (1, steps(0, 3) + steps(3, 8))):
        assert [one.keys for one in again] == [one.keys for one in plain], world
        assert all(torch.equal(a.images_BCHW, b.images_BCHW) for a, b in zip(again, plain, strict=True))
    epoch = list(chain.from_iterable(one.keys for one in plain if one.step < order.steps_per_epoch))
    assert len(set(epoch)) == len(epoch) and {name.partition("/")[2] for name in epoch} <= set(keys(some))
    seen = [key for batch in eval_loader(settings(), some, tokenizer, batch=4) for key in batch.keys]
    assert [name.partition("/")[2] for name in seen] == keys(some)


def test_it_is_verified_and_inspected_like_any_other(tiny_shards, capsys):
    some = select(tiny_shards(SIZES))
    assert main(["verify", some.path, "--workers", "1"]) == 0 and main(["inspect", some.path]) == 0
    out = capsys.readouterr().out
    assert f"all 3 shards ({40 - len(DROPPED)} samples)" in out and "selected   33 of the 37 samples" in out
    shard = some.shards[0]
    with pytest.raises(ValueError, match="has 9 samples, its manifest says 8"):
        ShardReader(shard.url, replace(shard, selection=Selection.where(np.ones(8, bool))))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"of": 9}, "it is not a number of samples and a mask"),
        ({"of": 9, "mask": "!"}, "it is not a number of samples and a mask"),
        ({"of": 9, "mask": "/w=="}, "its mask of 1 bytes is not one of 9 samples"),
        ({"of": 9, "mask": "//8="}, "its mask of 2 bytes is not one of 9 samples"),
        ({"of": 9, "mask": "/4A="}, "it selects 9 samples, nsamples is 7"),
    ],
)
def test_what_is_no_selection_is_refused(tiny_shards, selection, message):
    some = select(tiny_shards(SIZES))
    content = json.loads(Path(some.path).read_text())
    content["shardlist"][0]["selection"] = selection
    Path(some.path).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"shardlist\[0\]\.selection: {message}; make it again"):
        load_manifest(some.path)
