"""Encoding a data set once, over all processes, for evaluation.

Shape suffixes: N images and M texts of the data set, n and m of this process; B, L, C, H, W as in a batch; D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data_pipeline.loader import EvalBatch, eval_loader
from data_pipeline.storage.manifest import Manifest
from data_pipeline.tokenizer import Tokenizer
from train.config import RunConfig
from train.distributed import (
    all_gather_rows,
    all_reduce_max,
    any_rank,
    broadcast_object,
    gather_objects,
    rank,
    span,
    world_size,
)
from train.model.pair import PairModel

Autocast = Callable[[], AbstractContextManager]
Change = Callable[[EvalBatch], Tensor]
"""A decoded batch -> its images, changed: uint8 [B, 3, H, W]."""


@dataclass
class Features:
    """What the model makes of a data set, in the order of its manifest; the same on every process."""

    image_ND: Tensor
    """Unit vectors, float32, on the model's device."""
    text_MD: Tensor
    """Unit vectors of all captions of all images, float32."""
    image_of_text_M: Tensor
    """int64: for each text the row of its image."""
    keys: list[str]
    """Per image "shard name/sample key"."""
    captions: list[str]
    """The texts."""
    classes: list[str | None]
    """Per image the content of its `cls` member, None where it has none."""
    bad: list[dict]
    """Records of samples that could not be read and so are not among the images: shard, key, cause."""

    def with_captions(self) -> Features:
        """Without the images that have no caption, which are among `bad` then."""
        owners_M, device = self.image_of_text_M, self.image_of_text_M.device
        has_text_N = torch.zeros(len(self.keys), dtype=torch.bool, device=device)
        has_text_N[owners_M] = True
        if bool(has_text_N.all()):
            return self
        rows = has_text_N.nonzero()[:, 0].tolist()
        lacking = [self.keys[row] for row in (~has_text_N).nonzero()[:, 0].tolist()]
        return replace(
            self,
            image_ND=self.image_ND[has_text_N],
            image_of_text_M=(has_text_N.cumsum(0) - 1)[owners_M],
            keys=[self.keys[row] for row in rows],
            classes=[self.classes[row] for row in rows],
            bad=[*self.bad, *({"shard": "", "key": key, "cause": "no caption"} for key in lacking)],
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode and no gradients inside; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # Not inference_mode: whatever a module keeps from such a forward pass, such as a cached buffer, could not take
        # part in the next training step.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


class Encoder:
    """A model as it is now, and what is needed to encode held-out data and texts with it.

    All processes use it together, on a module that can be called directly (not the engine's wrapper). The features of
    a data set are kept until `forget`, so that several tasks can share them. Its decoded images are kept to the end
    where they fit into `eval.cache_gb`; where they do not, its loader processes are.

    Args:
        autocast: makes the context of every forward pass, such as `train.engine.precision.autocast`.
    """

    def __init__(self, model: PairModel, config: RunConfig, tokenizer: Tokenizer, *, autocast: Autocast = nullcontext):
        self.model, self.config, self.tokenizer, self.autocast = model, config, tokenizer, autocast
        self._features: dict[str, Features] = {}
        self._loaders: dict[str, Iterable[EvalBatch]] = {}
        self._decoded: dict[str, list[EvalBatch]] = {}
        self._room = int(config.eval.cache_gb * 1e9)
        self._blank = _blank(config)

    def forget(self) -> None:
        """Drop the features that are kept: the weights are about to change."""
        self._features.clear()

    def features(self, manifest: Manifest) -> Features:
        """Every sample of `manifest`, encoded once: each process does its share, all get the whole result.

        All processes make the same number of forward passes, because ZeRO-3 gathers parameters in each of them.

        Raises:
            ValueError: not one sample could be read.
        """
        if manifest.path not in self._features:
            self._features[manifest.path] = self._encode(manifest)
        return self._features[manifest.path]

    @contextmanager
    def changed(self, manifest: Manifest, change: Change) -> Iterator[None]:
        """Inside, the images of this data set are what `change` makes of them; texts, classes, all else are as before.

        Raises:
            ValueError: not one sample could be read.
        """
        plain = self.features(manifest)
        images, counts = [], 0
        with evaluating(self.model):
            for batch in _in_step(self._batches(manifest), self._blank):
                images.append(self._images(replace(batch, images_BCHW=change(batch)) if batch.keys else batch))
                counts += len(batch.keys)
        image_ND = _gather_uneven(torch.cat(images), broadcast_object(gather_objects(counts)))
        self._features[manifest.path] = replace(plain, image_ND=image_ND)
        try:
            yield
        finally:
            self._features[manifest.path] = plain

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [M, D] float32 of M texts; every process encodes all of them."""
        ids_ML, mask_ML = self.tokenizer(texts)
        with evaluating(self.model):
            return self._texts(ids_ML, mask_ML)

    def _encode(self, manifest: Manifest) -> Features:
        images: list[Tensor] = []
        texts: list[Tensor] = []
        owners: list[int] = []
        keys: list[str] = []
        captions: list[str] = []
        classes: list[str | None] = []
        bad: list[dict] = []
        with evaluating(self.model):
            for batch in _in_step(self._batches(manifest), self._blank):
                images.append(self._images(batch))
                shown = batch if batch.keys else self._blank
                texts.append(self._texts(shown.ids_ML, shown.mask_ML)[: len(batch.captions)])
                owners += [len(keys) + row for row in batch.caption_row]
                keys += batch.keys
                captions += batch.captions
                classes += batch.classes
                bad += batch.bad
        parts = broadcast_object(gather_objects((owners, keys, captions, classes, bad)))
        if not any(part[1] for part in parts):
            raise ValueError(f"{manifest.path}: not one of its {manifest.nsamples} samples could be read")
        owners, keys, captions, classes, bad = [], [], [], [], []
        for part in parts:
            owners += [len(keys) + row for row in part[0]]
            keys += part[1]
            captions += part[2]
            classes += part[3]
            bad += part[4]
        return Features(
            image_ND=_gather_uneven(torch.cat(images), [len(part[1]) for part in parts]),
            text_MD=_gather_uneven(torch.cat(texts), [len(part[2]) for part in parts]),
            image_of_text_M=torch.tensor(owners, dtype=torch.int64, device=self._device()),
            keys=keys,
            captions=captions,
            classes=classes,
            bad=bad,
        )

    def _batches(self, manifest: Manifest) -> Iterable[EvalBatch]:
        """This process's share of a data set."""
        path = manifest.path
        if path in self._decoded:
            return self._decoded[path]
        if path in self._loaders:
            return self._loaders[path]
        first, last = span(manifest.nsamples)
        size = (last - first) * 3 * self.config.data.evaluated_size**2
        fits = size <= self._room
        share = {"batch": self.config.eval.batch, "rank": rank(), "world": world_size()}
        loader = eval_loader(self.config.data, manifest, self.tokenizer, keep=not fits, **share)
        if not fits:
            self._loaders[path] = loader
            return loader
        return self._keeping(path, loader, size)

    def _keeping(self, path: str, loader: Iterable[EvalBatch], size: int) -> Iterator[EvalBatch]:
        """The batches of a loader, which are kept once it has come to its end; size: of their images, in bytes."""
        kept = []
        for batch in loader:
            kept.append(batch.clone())
            yield batch
        self._decoded[path] = kept
        self._room -= size

    def _images(self, batch: EvalBatch) -> Tensor:
        """Unit vectors of a batch's images; a batch without any still makes its forward pass."""
        shown = batch if batch.keys else self._blank
        with self.autocast():
            image_BD = self.model.encode_image(shown.images_BCHW.to(self._device()))
        return image_BD[: len(batch.keys)].float()

    def _texts(self, ids_ML: Tensor, mask_ML: Tensor) -> Tensor:
        """`eval.batch` texts at a time; every process makes as many forward passes as the one with the most texts."""
        device, size, count = self._device(), self.config.eval.batch, len(ids_ML)
        ids_ML, mask_ML = ids_ML.to(device), mask_ML.to(device)
        if not count:  # an encoder fails on no texts at all
            ids_ML, mask_ML = ids_ML.new_zeros(1, 8), mask_ML.new_ones(1, 8)
        passes = int(all_reduce_max(torch.tensor([-(-count // size)], device=device)))
        features = []
        for start in range(0, passes * size, size):
            done = start >= count
            rows = slice(0, 1) if done else slice(start, start + size)
            with self.autocast():
                text_BD = self.model.encode_text(ids_ML[rows], mask_ML[rows])
            if not done:
                features.append(text_BD.float())
        return torch.cat(features) if features else torch.empty(0, self.config.model.embed_dim, device=device)

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _in_step(batches: Iterable[EvalBatch], blank: EvalBatch) -> Iterator[EvalBatch]:
    """`batches`, then blanks for as long as any process still has a batch; at least one on each process."""
    iterator = iter(batches)
    batch = next(iterator, None)
    yield batch or blank
    while True:
        batch = next(iterator, None)
        if not any_rank(batch is not None):
            return
        yield batch or blank


def _blank(config: RunConfig) -> EvalBatch:
    """One black image and one empty caption, which count for no sample."""
    side = config.data.evaluated_size
    return EvalBatch(
        images_BCHW=torch.zeros(1, 3, side, side, dtype=torch.uint8),
        ids_ML=torch.zeros(1, 8, dtype=torch.int64),
        mask_ML=torch.ones(1, 8, dtype=torch.int64),
        caption_row=[],
        captions=[],
        classes=[],
        keys=[],
    )


def _gather_uneven(rows_nD: Tensor, counts: list[int]) -> Tensor:
    """The rows of all processes, in their order; process r has counts[r] of them."""
    most, width = max(counts), rows_nD.shape[1]
    padded_PD = rows_nD.new_zeros(most, width)
    padded_PD[: len(rows_nD)] = rows_nD
    parts = all_gather_rows(padded_PD).view(len(counts), most, width)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
