"""Models and tokenizers of the Hugging Face hub: asked for once, fetched by one process of a host, checked by hash."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from data_pipeline.storage.files import sha256_of, take_lock

TIMEOUT_SECONDS = 5
"""Within which the hub has to answer the first question; its client and transformers retry for most of a minute."""
WEIGHTS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
)
"""Files of a model's weights as transformers has them, the best first."""
TEXTS = ("*.json", "*.txt", "*.model")
"""Files beside the weights: configurations and tokenizers."""


def fetch(name: str, files: Sequence[str], first_of: Sequence[Sequence[str]] = ()) -> Path:
    """The directory, in the hub's cache, of a repository; what it lacks is fetched, resuming where that was cut off.

    A terminal is asked before the first fetch of a process. Processes of a host fetch one after the other, so that all
    but the first find the files.

    Args:
        name: of the repository.
        files: patterns of the files that are needed.
        first_of: of these sets of patterns, the first one that the repository has files of is needed as well.

    Raises:
        ValueError: whoever was asked said no, or a file does not have its hash, and is removed.
        Exception: what the hub's client raises where the hub does not have it or cannot be reached, within seconds.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    info = HfApi().model_info(name, timeout=TIMEOUT_SECONDS, files_metadata=True)
    there = {sibling.rfilename: sibling for sibling in info.siblings or ()}
    wanted = _matching(there, files)
    for patterns in first_of:
        if found := _matching(there, patterns):
            wanted += found
            break
    _ask(name, sum(there[one].size or 0 for one in wanted))
    with _one_at_a_time(Path(constants.HF_HUB_CACHE)), _bars():
        directory = Path(snapshot_download(name, revision=info.sha, allow_patterns=sorted(set(wanted))))
        _remember_main(directory, str(info.sha))
    for one in wanted:
        lfs: Any = there[one].lfs
        if lfs is not None and sha256_of(directory / one) != lfs.sha256:
            (directory / one).resolve().unlink()
            (directory / one).unlink(missing_ok=True)
            raise ValueError(f"{one} of {name} did not have its sha256 and was removed: run again to fetch it")
    return directory


def _matching(names: Sequence[str] | dict, patterns: Sequence[str]) -> list[str]:
    """Files of the top folder alone: what is in folders is for other programs."""
    return [name for name in names if "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)]


_answers: list[bool] = []


def _ask(name: str, size: int) -> None:
    """Ask the terminal, where there is one on both sides and this process is not one of several; once."""
    if _answers or int(os.environ.get("WORLD_SIZE", "1")) > 1 or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    print(f"{name} is to be fetched from the Hugging Face hub ({size / 1e6:,.0f} MB). ", file=sys.stderr, end="")
    print("Fetch it, and what else this command needs? [Y/n] ", file=sys.stderr, end="", flush=True)
    if sys.stdin.readline().strip().lower() not in ("", "y", "yes"):
        raise ValueError("it was not to be fetched")
    _answers.append(True)


def _remember_main(directory: Path, commit: str) -> None:
    """Let those who look for the repository without a commit find this one, as after a fetch without one."""
    reference = directory.parents[1] / "refs" / "main"
    reference.parent.mkdir(exist_ok=True)
    reference.write_text(commit)


@contextmanager
def _one_at_a_time(cache: Path) -> Iterator[None]:
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".duet.lock").open("a") as lock:
        with suppress(OSError):  # a file system without locks: the client has locks of its own
            take_lock(lock)
        yield


@contextmanager
def _bars() -> Iterator[None]:
    """The client's progress bars on a terminal, and nowhere else."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    (enable_progress_bars if sys.stderr.isatty() else disable_progress_bars)()
    try:
        yield
    finally:
        (disable_progress_bars if before else enable_progress_bars)()
