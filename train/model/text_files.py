"""The text encoder and its tokenizer as files of a checkpoint, so that it needs no directory that a config names.

    text/config.json    the encoder's architecture
    tokenizer/          as transformers saves one

What counts is what these hold: a directory may be moved, spelled differently, or gone.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_pipeline.tokenizer import Tokenizer
from train.config import RunConfig
from train.model.pair import PairModel
from train.model.text import architecture

TEXT, TOKENIZER = "text", "tokenizer"


def text_files(model: PairModel, tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files by name, from which any machine builds the encoder and the tokenizer again.

    Raises:
        ValueError: the tokenizer becomes another one when it is saved and loaded.
    """
    files = {f"{TOKENIZER}/{name}": content for name, content in tokenizer.files().items()}
    return {f"{TEXT}/config.json": model.text.config_file(), **files}


def tokenizer_name(config: RunConfig) -> str:
    """Directory or hub name of the run's tokenizer."""
    return config.model.text.tokenizer or config.model.text.name


def own_tokenizer(model: PairModel, config: RunConfig) -> Tokenizer:
    """The run's tokenizer, which fills captions with padding where the model's text tower reads that."""
    tokenizer = Tokenizer(tokenizer_name(config), config.data.max_tokens)
    tokenizer.fills |= model.text.reads_padding
    return tokenizer


def with_own_text(config: RunConfig, directory: Path) -> RunConfig:
    """The configuration with the text encoder and tokenizer in `directory`; unchanged where there are none."""
    if not (directory / TEXT).is_dir():
        return config
    text = replace(config.model.text, name=str(directory / TEXT), tokenizer=str(directory / TOKENIZER))
    return replace(config, model=replace(config.model, text=text))


def another_text(given: RunConfig, before: RunConfig, directory: Path) -> str:
    """How the encoder or tokenizer that `given` names differs from those of a run; empty where they are the same.

    A name that is spelled as it was need not exist any more: `directory` has all that is needed.

    Args:
        before: the run's configuration, as it was given then.
        directory: holds the run's own files, or none, where the names are compared.

    Raises:
        ValueError: nothing can be loaded from a name that is spelled differently.
    """
    own = with_own_text(before, directory)
    now, then = given.model.text, before.model.text
    parts = (
        (
            "model.text.name",
            now.name,
            then.name,
            lambda name: architecture(name, now.weights == "pretrained", now.positions),
        ),
        (
            "model.text.tokenizer",
            tokenizer_name(given),
            tokenizer_name(before),
            lambda name: {"vocabulary and rules": Tokenizer(name, given.data.max_tokens).identity()},
        ),
    )
    for (field, name, old, content), saved in zip(parts, (own.model.text.name, tokenizer_name(own)), strict=True):
        if own is before:
            if name != old:
                return f"{field} {name}: the run was trained with {old}, and {directory} holds no copy of it: give that"
            continue
        if name == old and not Path(name).is_dir():
            continue
        try:
            found = content(name)
        except ValueError:
            if name == old:
                continue
            raise
        kept = content(saved)
        changed = [
            f"{key}: {kept.get(key)} -> {found.get(key)}"
            for key in {**kept, **found}
            if kept.get(key) != found.get(key)
        ]
        if changed:
            return f"{field} {name} is not what {directory} was trained with:\n  " + "\n  ".join(changed)
    return ""
