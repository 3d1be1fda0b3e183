"""Samples with all their captions, decoded without randomness: what evaluation reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from data_pipeline.batch import EvalBatch
from data_pipeline.config import DataConfig
from data_pipeline.order import Position
from data_pipeline.samples.image import BadSample
from data_pipeline.samples.text import split
from data_pipeline.samples.transforms import eval_transform
from data_pipeline.stages.collate import stacked
from data_pipeline.stages.readers import RawReader
from data_pipeline.stages.slots import sample_name, shard_name
from data_pipeline.stages.workers import of_this_worker
from data_pipeline.tokenizer import Tokenizer


class EvalSource:
    """First and only stage of evaluation: batches of decoded samples at `positions`, bad ones left out and recorded."""

    def __init__(
        self, readers: RawReader, positions: Sequence[Position], config: DataConfig, tokenizer: Tokenizer, batch: int
    ):
        self.readers, self.tokenizer, self.transform = readers, tokenizer, eval_transform(config)
        self.batches = [positions[start : start + batch] for start in range(0, len(positions), batch)]
        self.empty_BCHW = torch.empty((0, 3, config.evaluated_size, config.evaluated_size), dtype=torch.uint8)

    def __call__(self) -> Iterator[EvalBatch]:
        for positions in of_this_worker(self.batches):
            yield self._batch(positions)

    def _batch(self, positions: Sequence[Position]) -> EvalBatch:
        images: list[torch.Tensor] = []
        captions: list[str] = []
        caption_row: list[int] = []
        classes: list[str | None] = []
        keys, bad, numbers = [], [], []
        for place in positions:
            raw = self.readers.raw(place.source, place.shard, place.index)
            try:
                data, texts, label = split(raw, needs_caption=False)
                image = self.transform(data)
            except BadSample as error:
                bad.append({"shard": shard_name(raw), "key": raw["__key__"], "cause": error.cause})
                continue
            captions.extend(texts)
            caption_row.extend([len(images)] * len(texts))
            images.append(image)
            classes.append(label)
            keys.append(sample_name(raw))
            numbers.append(place.position)
        ids_ML, mask_ML = self.tokenizer(captions)
        images_BCHW = stacked(images) if images else self.empty_BCHW
        return EvalBatch(images_BCHW, ids_ML, mask_ML, caption_row, captions, classes, keys, bad, numbers)
