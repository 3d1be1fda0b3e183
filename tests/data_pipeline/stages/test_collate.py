"""Second views and hidden words: there when asked for, the same for any workers and ranks, and nothing else changed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.loader import Extras, MicroBatch, stream_loader, train_loader
from data_pipeline.order import build_order
from data_pipeline.samples.masking import UNMASKED, Masking
from data_pipeline.storage.manifest import Manifest, load_manifest
from data_pipeline.tokenizer import Tokenizer
from tests.support.loading import BATCH, LANES, MICRO, SEED, SIZES, assert_equal, settings

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
BOTH = Extras(second_view=True, mask=0.4)


def load(manifest: Manifest, tokenizer: Tokenizer, workers: int = 0, **options: object) -> list[MicroBatch]:
    order = build_order([manifest], [1.0], BATCH, LANES, SEED, 2)
    chosen = {"seed": SEED, "micro_batch": MICRO, "stop_step": 3, **options}
    return list(train_loader(settings(workers), order, [manifest], tokenizer, **chosen))


def test_extras_come_beside_what_there_is_without(tiny_shards: Callable[..., Path], tokenizer: Tokenizer) -> None:
    manifest = load_manifest(tiny_shards(SIZES))
    seen, plain = load(manifest, tokenizer, extras=BOTH), load(manifest, tokenizer)
    assert_equal(seen, plain)
    assert all(batch.views_BCHW is batch.masked_BL is batch.targets_BL is None for batch in plain)
    for batch in seen:
        assert batch.lengths == batch.mask_BL.sum(1).tolist()
        assert batch.views_BCHW.shape == batch.images_BCHW.shape and batch.views_BCHW.dtype == torch.uint8
        assert all(not torch.equal(*views) for views in zip(batch.images_BCHW, batch.views_BCHW, strict=True))
        hidden_BL = batch.targets_BL != UNMASKED
        assert torch.equal(batch.targets_BL[hidden_BL], batch.ids_BL[hidden_BL])
        assert torch.equal(batch.masked_BL[~hidden_BL], batch.ids_BL[~hidden_BL])
    assert any((batch.masked_BL != batch.ids_BL).any() for batch in seen)


def test_any_workers_and_ranks_give_the_same_extras(tiny_shards: Callable[..., Path], tokenizer: Tokenizer) -> None:
    manifest = load_manifest(tiny_shards(SIZES))
    expected = load(manifest, tokenizer, extras=BOTH)
    ranks = [load(manifest, tokenizer, workers=2, extras=BOTH, world=2, rank=rank) for rank in range(2)]
    found = {(batch.step, batch.index): batch for batches in ranks for batch in batches}
    for batch in expected:
        other = found.pop((batch.step, batch.index))
        for name in ("views_BCHW", "masked_BL", "targets_BL"):
            assert torch.equal(getattr(batch, name), getattr(other, name))
    assert not found


def test_streams_have_extras_too(tiny_shards: Callable[..., Path], tokenizer: Tokenizer) -> None:
    config = settings()
    config.train = str(tiny_shards(SIZES) / "*.tar")
    options = {"seed": SEED, "global_batch": BATCH, "micro_batch": MICRO, "stop_step": 1}
    batch = next(iter(stream_loader(config, tokenizer, extras=BOTH, **options)))
    assert batch.views_BCHW.shape == batch.images_BCHW.shape and batch.masked_BL.shape == batch.ids_BL.shape


def test_words_are_hidden_as_in_bert(tokenizer: Tokenizer) -> None:
    ids_BL, mask_BL = tokenizer([f"the red heart number {number}, a drawing of hearts" for number in range(2000)])
    masked_BL, targets_BL = Masking(tokenizer, 0.15)(ids_BL, [str(row) for row in range(len(ids_BL))])
    special_BL = torch.isin(ids_BL, torch.tensor(sorted(tokenizer.special_ids)))
    hidden_BL = targets_BL != UNMASKED
    assert not (hidden_BL & special_BL).any() and special_BL[mask_BL == 0].all()
    assert hidden_BL[~special_BL].float().mean().item() == pytest.approx(0.15, abs=0.01)
    became, was = masked_BL[hidden_BL], ids_BL[hidden_BL]
    assert (became == tokenizer.mask_id).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (became == was).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert became.max() < tokenizer.vocab_size

    wider_BL = torch.nn.functional.pad(ids_BL[5:9], (0, 8), value=tokenizer.pad_id)
    wider, _ = Masking(tokenizer, 0.15)(wider_BL, ["5", "6", "7", "8"])
    assert torch.equal(wider[:, : ids_BL.shape[1]], masked_BL[5:9]), "neighbours and padding change nothing"


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_cannot_be_hidden_is_refused(tokenizer: Tokenizer, share: float) -> None:
    with pytest.raises(ValueError, match=f"model.self_supervision.mask is {share}: a share of the tokens"):
        Masking(tokenizer, share)
