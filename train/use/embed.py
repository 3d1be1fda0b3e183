"""Embedding an input with a model, over all ranks, into an index that an interrupted command resumes.

The input is cut into parts of a fixed number of samples. Each is made by one rank, without a word to the others, and
written atomically; at the end rank 0 puts them together. What is in a part depends on nothing but its samples, so the
result has the same bytes however often it was interrupted and however many ranks made it (with the same number of
threads each, and on the same kind of device).

Shape suffixes: as in train.use.towers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from data_pipeline.batch import EvalBatch
from data_pipeline.embeddings.index import Index, open_index, read_about, write_about
from data_pipeline.embeddings.inputs import Input, TextInput
from data_pipeline.embeddings.parts import BAD, PARTS, Part, assemble, parts_there, ranges, remove_parts, write_part
from data_pipeline.loader import sample_loader
from data_pipeline.storage.files import own_lock
from train import distributed
from train.use.towers import Towers

LOCK = ".lock"
LOCK_SECONDS = 2
PART_SAMPLES = 1024
"""About how many samples a part has: what an interruption loses at most, on each rank."""


@dataclass(frozen=True)
class Embedded:
    """What an embedding made."""

    index: Index
    rate: float
    """Samples a second, over all ranks; 0 where nothing was left to do."""

    def __str__(self) -> str:
        about, out = self.index.about, self.index.directory
        counts = " and ".join(f"{about[kind]:,} {kind}" for kind in self.index.kinds)
        rate = f" ({self.rate:,.0f} samples/s)" if self.rate else ""
        bad = f"\n{about['bad']:,} samples could not be read: {out / BAD}" if about["bad"] else ""
        return f"{counts}, {about['dims']} dimensions: {out}{rate}{bad}"


def embed(towers: Towers, given: Input, out: Path, *, batch: int = 0, workers: int = 1) -> Embedded | None:
    """Embed all of an input; a collective, whose result is rank 0's.

    Args:
        out: a directory that is not there yet, or one that the same command began.
        batch: rows of a forward pass; 0 for the model's own number.
        workers: loader processes of each rank.

    Raises:
        ValueError: on all ranks, where `out` holds something else, or not one sample could be read.
    """
    batch = batch or towers.batch
    size = batch * max(1, PART_SAMPLES // batch)
    count = -(-given.samples // size)
    request = {"model": towers.about(), "input": given.about(), "batch": batch, "part": size, "dims": towers.dims}
    with ExitStack() as stack:
        problem, done = "", set[int]()
        if distributed.is_main():
            try:
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_alone_in(out))
                if _claim(out, request):
                    done = set(range(count))
                else:
                    (out / PARTS).mkdir(exist_ok=True)
                    done = parts_there(out)
            except (OSError, ValueError) as error:
                problem = str(error) if isinstance(error, ValueError) else f"OUT {out} cannot be written: {error}"
        problem, done = distributed.broadcast_object((problem, done))
        if problem:
            raise ValueError(problem)
        missing = [number for number in range(count) if number not in done]
        began = time.perf_counter()
        own = missing[distributed.rank() :: distributed.world_size()]
        with tqdm(
            total=given.samples,
            initial=min(given.samples, len(done) * size),
            unit=" samples",
            desc="embed",
            disable=not (distributed.is_main() and missing),
        ) as bar:
            for number, part in zip(own, make_parts(towers, given, own, size, batch, workers, bar), strict=True):
                write_part(out, number, part)
                if not bar.disable:  # what other ranks have made counts when it is written
                    bar.n = min(given.samples, len(parts_there(out)) * size)
                    bar.refresh()
        distributed.barrier()  # the last of all ranks: what follows takes rank 0 as long as it needs
        if not distributed.is_main():
            return None
        rate = sum(len(one) for one in ranges(given.samples, size, missing)) / (time.perf_counter() - began)
        if not (read_about(out) or {})["complete"]:
            found = assemble(out, count)
            write_about(out, {**request, "complete": True, "normalized": True, "dtype": "float32", **found})
        remove_parts(out)
    return Embedded(open_index(out), rate)


@contextmanager
def _alone_in(out: Path) -> Iterator[None]:
    """Hold the lock on `out`. Raises ValueError where another process keeps it."""
    with own_lock(out / LOCK, LOCK_SECONDS) as is_ours:
        if not is_ours:
            raise ValueError(f"OUT {out}: another process is writing it: wait for it")
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)


def _claim(out: Path, request: dict[str, Any]) -> bool:
    """Begin an index in `out`, or resume it; whether it is complete. Raises ValueError where it is another one."""
    about = read_about(out)
    if about is None:
        if any(path.name != LOCK for path in out.iterdir()):
            raise ValueError(f"OUT {out} is not empty, and holds no index: give a directory that is not there yet")
        write_about(out, {**request, "complete": False})
        return False
    for what, remedy in (
        ("model", "the model that it was begun with"),
        ("input", "that input"),
        ("batch", "that number with --batch"),
    ):
        before, now = about[what], request[what]
        if isinstance(before, dict):  # where a model or an input is may change, not what it is
            before, now = ({**each, "path": ""} for each in (before, now))
        if before != now:
            raise ValueError(f"OUT {out} is of another {what} ({_shown(about[what])}): give {remedy}, or another OUT")
    return about["complete"]


def _shown(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    precision = f" in {value['precision']}" if "precision" in value else ""
    return f"{value['path']}{precision}, identity {value['identity'][:12]}"


def make_parts(
    towers: Towers, given: Input, numbers: Sequence[int], size: int, batch: int, workers: int, bar: tqdm
) -> Iterator[Part]:
    """The parts of these numbers, one after the other."""
    spans = list(ranges(given.samples, size, numbers))
    if isinstance(given, TextInput):
        for span in spans:
            yield _texts_part(towers, given, span, batch, bar)
        return
    config = replace(towers.data, workers=workers)
    positions = given.positions()
    own = list(chain.from_iterable(positions[span.start : span.stop] for span in spans))
    batches = iter(sample_loader(config, given.readers(config), own, towers.tokenizer, batch=batch) if own else ())
    for span in spans:
        # A part is a whole number of batches, but for the last one, which ends the last batch.
        yield _part(towers, (next(batches) for _ in range(-(-len(span) // batch))), batch, bar)


def _part(towers: Towers, batches: Iterable[EvalBatch], batch: int, bar: tqdm) -> Part:
    images, texts, part = [], [], _empty()
    for one in batches:
        # Results stay on the device to the end of the part: to fetch them is to wait for them.
        if one.keys:
            images.append(towers.images(one.images_BCHW))
        texts.append(towers.tokens(one.ids_ML, one.mask_ML, batch))
        part.image_samples += one.samples
        part.image_keys += one.keys
        part.text_samples += [one.samples[row] for row in one.caption_row]
        part.text_keys += [one.keys[row] for row in one.caption_row]
        part.texts += one.captions
        part.bad += one.bad
        bar.update(len(one.keys) + len(one.bad))
    return replace(part, image_ND=_stacked(images, towers), text_MD=_stacked(texts, towers))


def _texts_part(towers: Towers, given: TextInput, span: range, batch: int, bar: tqdm) -> Part:
    texts, part = [], _empty()
    for start in range(span.start, span.stop, batch):
        rows = range(start, min(start + batch, span.stop))
        keys, lines = zip(*(given.lines[row] for row in rows), strict=True)
        texts.append(towers.tokens(*towers.tokenizer(lines), batch))
        part.text_samples += rows
        part.text_keys += keys
        part.texts += lines
        bar.update(len(rows))
    return replace(part, image_ND=_stacked([], towers), text_MD=_stacked(texts, towers))


def _empty() -> Part:
    nothing_0D = torch.empty(0, 0).numpy()
    return Part(nothing_0D, nothing_0D)


def _stacked(parts: list[torch.Tensor], towers: Towers):
    return torch.cat(parts).cpu().numpy() if parts else torch.empty(0, towers.dims).numpy()
