"""Writing one checkpoint: whole under another name first, then under its own; then older ones may leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from data_pipeline.storage.files import sha256_of, sync, write_atomically
from train import checkpoint, cli, distributed
from train.checkpoint import BEST, FILES, FORMATS, HASHES, STATE, Tensors, TrainState
from train.config import RunConfig
from train.run.directory import CONFIG


@dataclass(frozen=True)
class Content:
    """All that one checkpoint holds, as it was at its step: tensors, and the other files by name."""

    tensors: Tensors
    texts: Mapping[str, bytes]


def contents(tensors: Tensors, state: TrainState, config: RunConfig, text_files: Mapping[str, bytes]) -> Content:
    """A checkpoint's files as they are to be written, whatever becomes of `state`."""
    assert not any("_orig_mod." in name for name in tensors.model), "hand the names of the plain model, not compiled"
    versions = {"torch": str(torch.__version__), "transformers": version("transformers")}
    said = {"format": FORMATS[-1], "state": asdict(state), **versions}
    own = {STATE: (json.dumps(said, indent=2) + "\n").encode(), CONFIG: cli.to_yaml(config).encode()}
    return Content(tensors, own | dict(text_files))


def begin(run_dir: Path, step: int) -> str:
    """Make the directory in which a checkpoint is until it is complete; what is wrong where that fails.

    Before the next step is logged: by this directory one knows that no checkpoint of the steps before has got lost.
    """
    target = checkpoint.path_of(run_dir, step)
    try:
        for left in target.parent.glob(".step_*.part"):  # of an interrupted save or removal: room and names
            shutil.rmtree(left, ignore_errors=True)
        checkpoint.unfinished(target).mkdir(parents=True)
    except OSError as error:
        return _in_words(target, error)
    return ""


def write(run_dir: Path, step: int, content: Content, keep: int, best: bool = False) -> str:
    """Write a checkpoint that was begun; then the oldest over `keep` leave, where `keep` is not 0.

    Returns:
        What is wrong where that fails; then what has been written of it is gone, and earlier ones are as they were.
    """
    target = checkpoint.path_of(run_dir, step)
    try:
        _fill(checkpoint.unfinished(target), content)
        _complete(target)
        if best:
            name_best(run_dir, step)
        prune(target, keep)
    except (OSError, SafetensorError) as error:
        _empty(checkpoint.unfinished(target))
        return _in_words(target, error)
    return ""


def mark_best(run_dir: Path, step: int, keep: int) -> None:
    """Name the checkpoint of this step the best one, which retention leaves; the one before it may go. A collective.

    Raises:
        ValueError: on all ranks, where the directory cannot be written.
    """
    problem, target = "", checkpoint.path_of(run_dir, step)
    if distributed.is_main():
        try:
            name_best(run_dir, step)
            prune(target, keep)
        except OSError as error:
            problem = f"{target.with_name(BEST)} could not be written: {error}; free or mend the disk and start again"
    if problem := distributed.broadcast_object(problem):
        raise ValueError(problem)


def _fill(part: Path, content: Content) -> None:
    """All files of a checkpoint, on the disk when it returns."""
    for tensors in fields(Tensors):
        save_file(getattr(content.tensors, tensors.name), part / f"{tensors.name}.safetensors")
    for name, text in content.texts.items():
        (part / name).parent.mkdir(exist_ok=True)
        (part / name).write_bytes(text)
    names = dict.fromkeys((*FILES, *content.texts))
    hashes = {name: sha256_of(part / name) for name in names}
    (part / HASHES).write_text(json.dumps(hashes, indent=2) + "\n")
    for path in [*(part / name for name in (*hashes, HASHES)), *(p for p in part.rglob("*") if p.is_dir())]:
        sync(path)
    sync(part)


def _complete(target: Path) -> None:
    """Give a checkpoint whose files are all on the disk its name, and name it the latest one."""
    if target.exists():  # the same step again, after a restart from an older one
        shutil.rmtree(target)
    checkpoint.unfinished(target).rename(target)
    write_atomically(target.with_name("latest"), target.name + "\n")
    sync(target.parent)


def name_best(run_dir: Path, step: int) -> None:
    """Name the checkpoint of this step the best one."""
    target = checkpoint.path_of(run_dir, step)
    write_atomically(target.with_name(BEST), f"{target.name}\n")


def prune(target: Path, keep: int) -> None:
    """Drop what is older than the `keep` newest up to `target`, which was just saved; the best one stays.

    Later ones, which can only be there because they were passed over as damaged, must not push it out.
    """
    run_dir = target.parent.parent
    spared = checkpoint.best(run_dir)
    kept = [path for path in checkpoint.complete(run_dir) if path.name <= target.name]
    for path in [path for path in kept[keep:] if path.name != spared] if keep else []:
        # First out of the name that marks it complete: an interrupted removal must not look like a checkpoint.
        shutil.rmtree(path.rename(checkpoint.unfinished(path)))


def _empty(part: Path) -> None:
    """Free the room that an unfinished checkpoint takes; its directory stays, for what `begin` says."""
    with suppress(OSError):
        for path in part.iterdir():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _in_words(target: Path, error: Exception) -> str:
    return f"checkpoint {target} could not be written: {error}; free or mend the disk and start again"
