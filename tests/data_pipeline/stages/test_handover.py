"""Batches come out of loader processes as they were made, in memory that is used again once nobody holds any of it."""

import os
from collections.abc import Iterator

import pytest
import torch

from data_pipeline.batch import EvalBatch, MicroBatch, Recoloring
from data_pipeline.stages.workers import WorkerLoader
from tests.support.loading import assert_equal

PREFETCH = 2


def batch_of(number: int) -> MicroBatch:
    """Tensors of all kinds, every one of which tells the number; captions longer and longer."""
    ids_BL = torch.full((2, 8 + number), number)
    return MicroBatch(
        torch.full((2, 16, 16, 3), number, dtype=torch.uint8).permute(0, 3, 1, 2),
        ids_BL,
        ids_BL.T.clone().T,  # as it lies in memory
        index=number,
        step=0,
        keys=[str(number)],
        image_ids_B=torch.arange(number % 3),
        text_ids_B=torch.tensor([number]),
        colors=Recoloring(torch.tensor([1]), torch.full((1, 37), float(number)), turns=True) if number % 2 else None,
    )


class Batches:
    """So many of them."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self) -> Iterator[MicroBatch]:
        yield from map(batch_of, range(self.count))


def loader(count: int, keep: bool = False) -> WorkerLoader:
    return WorkerLoader(Batches(count), workers=1, prefetch=PREFETCH, keep=keep)


def test_a_batch_is_as_it_was_made_and_all_its_tensors_are_in_one_piece() -> None:
    for number, batch in enumerate(loader(6)):
        assert_equal([batch], [batch_of(number)])
        assert batch.images_BCHW.is_contiguous(memory_format=torch.channels_last)
        pieces: set[int] = set()
        for tensor in (batch.images_BCHW, batch.ids_BL, batch.mask_BL, batch.text_ids_B):
            pieces.add(tensor.untyped_storage().data_ptr())
        assert len(pieces) == 1


def test_a_piece_is_used_again_when_its_batch_is_gone() -> None:
    seen = [batch.images_BCHW.data_ptr() for batch in loader(60)]
    # Those on their way, the one held here, the one that is made; a few were too small for the longest captions.
    assert len(set(seen)) <= 2 * (PREFETCH + 2)


@pytest.mark.parametrize("part", [lambda batch: batch, lambda batch: batch.images_BCHW[1, 2:, 3]])
def test_a_piece_is_not_used_again_while_a_batch_or_a_view_of_it_is_held(part) -> None:
    held = []
    for batch in loader(40):
        if batch.index in (3, 7):
            held.append(part(batch))
    for number, kept in zip((3, 7), held, strict=True):
        if isinstance(kept, MicroBatch):
            assert_equal([kept], [batch_of(number)])
        else:
            assert (kept == number).all()


def test_batches_outlive_their_loader() -> None:
    batches = list(loader(9))
    assert_equal(batches, [batch_of(number) for number in range(9)])


def test_what_a_forked_process_lets_go_of_is_still_held_here() -> None:
    iterator = iter(loader(40))
    held = [next(iterator) for _ in range(2)]
    if (pid := os.fork()) == 0:
        held.clear()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    rest = list(iterator)
    assert_equal([*held, *rest], [batch_of(number) for number in range(40)])


def test_processes_that_are_kept_use_their_pieces_in_the_next_iteration() -> None:
    kept, seen = loader(12, keep=True), set()
    for _ in range(3):
        next(iter(kept))  # given up, with what is on its way
        for number, batch in enumerate(kept):
            assert_equal([batch], [batch_of(number)])
            seen.add(batch.images_BCHW.data_ptr())
    assert len(seen) <= 2 * (PREFETCH + 2)


def test_a_batch_without_images_comes_through() -> None:
    nothing = torch.empty((0, 8), dtype=torch.int64)
    empty = EvalBatch(torch.empty((0, 3, 4, 4), dtype=torch.uint8), nothing, nothing, [], [], [], [])
    (seen,) = WorkerLoader([empty], workers=1, prefetch=1)
    assert seen.images_BCHW.shape == (0, 3, 4, 4) and seen.ids_ML.shape == (0, 8)
