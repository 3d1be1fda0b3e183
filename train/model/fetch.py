"""A whole model of another library: in a directory, or in a repository on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_pipeline.storage.hub import TEXTS, fetch
from data_pipeline.tokenizer import first_line


def repository(name: str, first_of: Sequence[Sequence[str]], given: str) -> Path:
    """The directory of that name, or the one in the hub's cache of the repository of that name; else it is fetched.

    Args:
        first_of: sets of patterns of its weights; the first one that there are files of is taken.
        given: the field that named it, with its value.

    Raises:
        ValueError: there is no such directory, and the hub does not have it or cannot be reached.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(name).is_dir():
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"{given}: no such directory")
    for first, *_ in first_of:
        if isinstance(found := try_to_load_from_cache(name, first), str):
            return Path(found).parent
    try:
        return fetch(name, TEXTS, first_of)
    except Exception as error:
        raise ValueError(
            f"{given} cannot be fetched from the Hugging Face hub ({first_line(error)}): copy what is at "
            f"https://huggingface.co/{name} to a directory of this machine, and give that"
        ) from error
