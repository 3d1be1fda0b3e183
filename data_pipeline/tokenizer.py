"""Captions -> token ids, padded to the longest caption of the batch. Shape suffixes: B captions, L tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

# Loader processes are the parallelism here; threads inside them would only compete (and cannot survive a fork).
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HUB_TIMEOUT_SECONDS = 5
ROUND_TO = 8
"""Lengths are multiples of this, which is what matrix units like, up to max_tokens."""


class Tokenizer:
    """The tokenizer that belongs to a text encoder.

    name: a directory, or a name on the Hugging Face hub. max_tokens: longest result, special tokens included; longer
    captions are cut. Raises ValueError where there is no such tokenizer, or none that can be used.
    """

    def __init__(self, name: str, max_tokens: int):
        self._tokenizer = _load(name)
        special = set(self._tokenizer.all_special_ids)
        if len(self._tokenizer) <= len(special):
            raise ValueError(
                f"--model.text.tokenizer {name}: its vocabulary holds only the special tokens; "
                f"name a directory that holds tokenizer.json, or vocab.txt and tokenizer_config.json"
            )
        if self._tokenizer.pad_token_id is None:
            raise ValueError(f"--model.text.tokenizer {name} has no padding token; use one of a BERT-family encoder")
        least = self._tokenizer.num_special_tokens_to_add() + 1
        if max_tokens < least:
            raise ValueError(f"--data.max_tokens is {max_tokens}: at least {least}, the special tokens and one more")
        self.name, self.max_tokens = name, max_tokens
        self.pad_id = int(self._tokenizer.pad_token_id)
        self.mask_id: int | None = self._tokenizer.mask_token_id
        self.special_ids = frozenset(special)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included: ids are below it."""
        return len(self._tokenizer)

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids_BL and mask_BL (1 for a token, 0 for padding on the right), both int64.

        L is the longest caption in tokens rounded up to 8, and at most max_tokens: a function of these captions alone.
        """
        rows = (
            self._tokenizer(list(captions), truncation=True, max_length=self.max_tokens)["input_ids"]
            if captions
            else []
        )
        longest = max(map(len, rows), default=1)
        length = min(-(-longest // ROUND_TO) * ROUND_TO, self.max_tokens)
        ids_BL = torch.full((len(rows), length), self.pad_id, dtype=torch.int64)
        mask_BL = torch.zeros((len(rows), length), dtype=torch.int64)
        for row, ids in enumerate(rows):
            ids_BL[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64)
            mask_BL[row, : len(ids)] = 1
        return ids_BL, mask_BL


def ask_hub(name: str) -> None:
    """Raises what the hub's client raises when the hub does not have `name` or cannot be reached, within seconds.

    One short question before a download: transformers retries for most of a minute where there is no network.
    """
    from huggingface_hub import HfApi

    HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)


def _load(name: str):
    from transformers import AutoTokenizer

    local = Path(name).is_dir()
    try:
        try:
            # What the hub's cache holds is used without asking the hub.
            return AutoTokenizer.from_pretrained(name, local_files_only=True)
        except Exception:
            if local:
                raise
            ask_hub(name)
            return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the hub, damaged files and unknown kinds each have exceptions of their own
        raise ValueError(_remedy(name, error)) from error


def _remedy(name: str, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")
    if Path(name).is_dir():
        return (
            f"--model.text.tokenizer {name}: no tokenizer could be loaded from this directory ({reason}); "
            f"it needs tokenizer.json, or vocab.txt and tokenizer_config.json"
        )
    return (
        f"--model.text.tokenizer {name} is no directory, and could not be had from the Hugging Face hub ({reason}); "
        f"without network, give a local directory that holds its tokenizer.json"
    )
