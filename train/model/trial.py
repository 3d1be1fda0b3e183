"""What is found out about a model before it trains, by one blank micro-batch: whether all of it learns.

It runs where the model is whole, before an engine takes it; weights, statistics and random states stay as they are.
Shapes: B captions, L tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from data_pipeline.tokenizer import ROUND_TO, Tokenizer
from train.config import RunConfig
from train.model.names import some
from train.model.pair import PairModel
from train.model.text import TextTower

CAPTIONS = ("a photo of a red heart on the wall of a white house", "a drawing")
SAME = 1e-3
"""Largest change of features, relative to the largest of them, that rounding may make; it makes about 1e-6."""


def try_out(model: PairModel, tokenizer: Tokenizer, config: RunConfig) -> list[str]:
    """Keep from learning what no gradient reaches, for which engines would wait; returns what to say of it.

    Raises:
        ValueError: the tokenizer makes ids that the text encoder does not have; a micro-batch does not go through the
            model, or no gradient comes back; or the features of a caption change with its padding.
    """
    check_vocabulary(model.text, tokenizer, config)
    unused = _without_gradient(model, config)
    check_padding(model.text, tokenizer, config)
    for name in unused:
        model.get_parameter(name).requires_grad_(False)
    if not unused:
        return []
    return [f"the features do not depend on these parameters, which never learn: {some(unused)}"]


def check_vocabulary(tower: TextTower, tokenizer: Tokenizer, config: RunConfig) -> None:
    """Raises ValueError where the tokenizer has more tokens than the encoder."""
    if tokenizer.vocab_size > tower.vocab_size:
        raise ValueError(
            f"model.text.tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, and model.text.name "
            f"{config.model.text.name} knows {tower.vocab_size}: give the tokenizer that belongs to it"
        )


def check_padding(tower: TextTower, tokenizer: Tokenizer, config: RunConfig) -> None:
    """Raises ValueError where a caption's features depend on its padding, and so on the others of its batch."""
    if tokenizer.fills:  # every caption is padded alike
        return
    ids_BL, mask_BL = tokenizer(CAPTIONS)
    room = min(tokenizer.max_tokens, tower.max_tokens) - ids_BL.shape[1]
    if room < 1:  # then the shorter one alone, without the padding that it has there
        ids_BL, mask_BL = ids_BL[1:, : int(mask_BL[1].sum())], mask_BL[1:, : int(mask_BL[1].sum())]
    more = (0, min(max(room, 1), 2 * ROUND_TO))
    padded = F.pad(ids_BL, more, value=tokenizer.pad_id), F.pad(mask_BL, more)
    was_training = tower.training
    tower.eval()
    with torch.no_grad():
        as_is, longer = tower(ids_BL, mask_BL), tower(*padded)
    tower.train(was_training)
    if float((as_is - longer).abs().max()) > SAME * float(as_is.abs().max()):
        raise ValueError(
            f"model.text.name {config.model.text.name}: the features of a caption change with its padding, and so with "
            "the other captions of its batch; take an encoder that leaves padding out, such as bert-base-uncased"
        )


def _without_gradient(model: PairModel, config: RunConfig) -> list[str]:
    """Names of parameters that learn by the configuration and that no gradient reaches."""
    learning = {name: value for name, value in model.named_parameters() if value.requires_grad}
    try:
        outputs = model([model.blank_micro_batch(min(config.train.micro_batch, 2))], [0])
        total = torch.stack([value.float().sum() for value in outputs.values()]).sum()
        gradients = torch.autograd.grad(total, list(learning.values()), allow_unused=True)
    except Exception as error:  # each model has its own kinds of failure
        raise ValueError(_culprit(model, config, error)) from error
    return [name for name, gradient in zip(learning, gradients, strict=True) if gradient is None]


def _culprit(model: PairModel, config: RunConfig, error: Exception) -> str:
    """Which tower it is that a blank micro-batch does not go through, and what to do."""
    image, text = f"model.image.name {config.model.image.name}", f"model.text.name {config.model.text.name}"
    why = f"{type(error).__name__}: {error}"
    rows = min(config.train.micro_batch, 2)
    with torch.no_grad():
        try:
            blank = model.blank_micro_batch(rows)
            model.encode_image(blank.images_BCHW)
        except Exception:
            size = f"data.image_size {config.data.image_size}"
            more = "" if rows > 1 else ", or train.micro_batch 2, since its norm may need more than one image"
            return f"{size}: such images do not go through {image} ({why}); set the size that it is made for{more}"
        try:
            model.encode_text(blank.ids_BL, blank.mask_BL)
        except Exception:
            return f"{text}: captions do not go through it ({why}); take an encoder of the BERT family"
    return f"no gradient comes back through {image} and {text} ({why}); take other towers"
