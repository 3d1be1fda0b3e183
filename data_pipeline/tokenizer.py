"""Captions -> token ids, padded to the longest caption of the batch. Shape suffixes: B captions, L tokens.

SigLIP's are padded to max_tokens, by tokens like any other: it was trained to read its padding.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.storage.hub import TEXTS, fetch

# Loader processes are the parallelism here; threads inside them would only compete (and cannot survive a fork).
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# What tokenizer_config.json notes of how it was loaded, and of code that is never run.
NOT_KEPT = ("is_local", "local_files_only", "trust_remote_code", "name_or_path", "auto_map")
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
                f"model.text.tokenizer {name}: its vocabulary holds only the special tokens; "
                f"name a directory that holds tokenizer.json, or vocab.txt and tokenizer_config.json"
            )
        if self._tokenizer.pad_token_id is None:
            raise ValueError(f"model.text.tokenizer {name} has no padding token; use the one of the text tower")
        least = self._tokenizer.num_special_tokens_to_add() + 1
        if max_tokens < least:
            raise ValueError(f"data.max_tokens is {max_tokens}: at least {least}, the special tokens and one more")
        self.name, self.max_tokens = name, max_tokens
        self.pad_id = int(self._tokenizer.pad_token_id)
        self.mask_id: int | None = self._tokenizer.mask_token_id
        self.special_ids = frozenset(special)
        self.fills = "attention_mask" not in self._tokenizer.model_input_names or _is_siglip(self._tokenizer)
        """Whether captions are filled up to max_tokens with padding that counts as tokens; its files keep that."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included: ids are below it."""
        return len(self._tokenizer)

    def identity(self) -> str:
        """A hash of everything that its ids depend on, wherever it was loaded from."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        rules: Mapping = self._tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
        # Set by every call.
        content = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
        ids = [self.pad_id, self.mask_id, sorted(self.special_ids)]
        return hashlib.sha256(json.dumps([content, ids], sort_keys=True).encode()).hexdigest()

    def files(self) -> dict[str, bytes]:
        """The files, by name, of a directory that makes this tokenizer again when loaded; no path of this machine.

        Raises:
            ValueError: it becomes another one when it is saved and loaded.
        """
        if (backend := getattr(self._tokenizer, "backend_tokenizer", None)) is not None:
            backend.no_truncation()  # which every call sets again
            backend.no_padding()
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            self._tokenizer.save_pretrained(directory)
            path = directory / "tokenizer_config.json"
            options = json.loads(path.read_text(encoding="utf-8"))
            options = {key: value for key, value in options.items() if key not in NOT_KEPT}
            if self.fills:
                options["model_input_names"] = ["input_ids"]
            path.write_text(json.dumps(options, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            if Tokenizer(name, self.max_tokens).identity() != self.identity():
                raise ValueError(
                    f"model.text.tokenizer {self.name} is another one after it was saved and loaded; "
                    "give a directory that transformers itself has saved"
                )
            paths = sorted(path for path in directory.rglob("*") if path.is_file())
            return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids_BL and mask_BL (1 for a token, 0 for padding on the right), both int64.

        L is the longest caption in tokens rounded up to 8, and at most max_tokens: a function of these captions alone.
        Of a tokenizer that fills, L is max_tokens, and the mask is all ones.
        """
        rows = (
            self._tokenizer(list(captions), truncation=True, max_length=self.max_tokens)["input_ids"]
            if captions
            else []
        )
        longest = max(map(len, rows), default=1)
        length = self.max_tokens if self.fills else min(-(-longest // ROUND_TO) * ROUND_TO, self.max_tokens)
        ids, mask = [], []
        for row in rows:
            padding = length - len(row)
            ids += [*row, *[self.pad_id] * padding]
            mask += [1] * len(row) + [int(self.fills)] * padding
        shape = len(rows), length
        return torch.tensor(ids, dtype=torch.int64).view(shape), torch.tensor(mask, dtype=torch.int64).view(shape)


def _is_siglip(tokenizer) -> bool:
    return type(tokenizer).__name__.startswith("Siglip")


def first_line(error: Exception) -> str:
    """What transformers or the hub's client says; never its advice to run code that came with a model."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is never run"
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(" .:")


def _load(name: str):
    from transformers import AutoTokenizer

    local = Path(name).is_dir()
    try:
        try:
            # What the hub's cache holds is used without asking the hub.
            return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        except Exception:
            if local:
                raise
            fetch(name, TEXTS)
            return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the hub, damaged files and unknown kinds each have exceptions of their own
        raise ValueError(_remedy(name, error)) from error


def _remedy(name: str, error: Exception) -> str:
    reason = first_line(error)
    if Path(name).is_dir():
        return (
            f"model.text.tokenizer {name}: no tokenizer could be loaded from this directory ({reason}); "
            f"it needs tokenizer.json, or vocab.txt and tokenizer_config.json"
        )
    return (
        f"model.text.tokenizer {name} is no directory, and could not be fetched from the Hugging Face hub ({reason}); "
        f"without network, give a local directory that holds its tokenizer.json"
    )
