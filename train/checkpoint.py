"""Checkpoints that are complete or absent, and can be resumed under any engine and world size, from anywhere.

    checkpoints/step_00000500/   model.safetensors      parameters and buffers, fp32, by name
                                 optimizer.safetensors  AdamW's moments, by parameter name
                                 ema.safetensors        moving average of the weights, where there is one
                                 state.json             TrainState: progress, data, precision, code; versions
                                 config.yaml            the resolved configuration
                                 text/config.json       the text encoder's architecture
                                 tokenizer/             its tokenizer, as transformers saves one
                                 sha256.json            hash of each of the files above
    checkpoints/latest           name of the newest one
    checkpoints/best             name of the best one, by `checkpoint.best`

A checkpoint is written under a temporary name, hashed, synced to disk and renamed; then `latest` moves; then old ones
leave (train.saving). Format 1, which is still read, had neither `text` nor `tokenizer`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.storage.files import sha256_of
from train import cli, distributed
from train.config import RunConfig
from train.model.pair import PairModel, build_model
from train.model.text_files import TEXT, TOKENIZER, another_text, with_own_text
from train.run.directory import CONFIG, onward

T = TypeVar("T")
FORMATS = (1, 2)
BEST = "best"
STATE = "state.json"
FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", STATE, CONFIG)
HASHES = "sha256.json"
RETRY_SECONDS = (0.5, 2.0)
"""Waits after which a file is read again: a network file system fails now and then."""


@dataclass
class TrainState:
    """All that a resumed run needs besides weights and moments: the order is a function of the step."""

    step: int = 0
    """Steps done; the next one is `step`."""
    first_step: int = 0
    """Step at which the run began: 0, or its parent's (train/parent.py)."""
    samples_seen: int = 0
    """Rows of all global batches so far, those of the run that it started from included."""
    updates: int = 0
    """Updates that the optimizer made: steps less the skipped ones."""
    skipped: int = 0
    """Steps without an update, because a gradient was not finite."""
    skipped_in_row: int = 0
    """How many of the latest steps were skipped, one after the other."""
    bad_samples: int = 0
    """Samples that were replaced, and written to the ledger."""
    seconds: float = 0.0
    """Time spent in training steps, over all sessions."""
    data_hash: str = ""
    """Hash of the training data: manifests and weights."""
    order: str = ""
    """Identity of the order of samples, whatever is in them; empty for a stream, and in older checkpoints."""
    moved_by: int = 0
    """The run's step s is step s + moved_by of that order."""
    mean: list[float] = field(default_factory=list)
    """Channel means that images are normalized with, 0 to 1."""
    std: list[float] = field(default_factory=list)
    """Channel standard deviations that images are normalized with, 0 to 1."""
    precision: str = ""
    """Of forward passes, bf16 or no; empty in format 1."""
    code: str = ""
    """Commit, or hash of the sources, that made the latest steps; empty in format 1."""
    init: str = ""
    """The sha256 of the weights that `init` named; empty where it named none."""
    balance: dict[str, float] = field(default_factory=dict)
    """What modality balance has measured, and the multipliers of the learning rates."""
    samples: dict[str, list[int]] = field(default_factory=dict)
    """ "source/epoch" -> samples assigned, trained and replaced; from train.run.tally."""


@dataclass
class Tensors:
    """What is saved of a model in training, by parameter name, on the CPU; empty on ranks other than 0."""

    model: dict[str, Tensor]
    """Parameters and buffers, whole."""
    optimizer: dict[str, Tensor]
    """AdamW's moments; empty before the first update."""
    ema: dict[str, Tensor]
    """Moving average of the weights; empty without `optim.ema`."""


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint whose files have their hashes, the same on all ranks; a collective. None: there is none.

    Damaged ones are named on the screen and passed over.

    Raises:
        ValueError: on all ranks, where there are checkpoints and none is whole, where they cannot be read, or where
            some ranks do not see the one that was found. Nothing on the disk is changed.
    """
    found, problem = None, ""
    if distributed.is_main():
        try:
            found = _newest_whole(run_dir)
        except OSError as error:
            problem = (
                f"runs_dir: {_root(run_dir)} cannot be read: {error}. Nothing was changed: mend the file system and "
                "start again; to resume from an earlier checkpoint, move those that cannot be read away"
            )
        except ValueError as error:
            problem = str(error)
    found, problem = distributed.broadcast_object((found, problem))
    if problem:
        raise ValueError(problem)
    if found is not None and distributed.any_rank(not (found / STATE).is_file()):
        raise ValueError(f"runs_dir: {found} is not on every host: give a directory on a file system that they share")
    return found


def verify(path: Path) -> str:
    """What is wrong with a checkpoint's files; empty where all is well.

    Raises:
        OSError: a file cannot be read, which is not damage.
    """
    try:
        hashes = json.loads(_patiently((path / HASHES).read_bytes))
        if not isinstance(hashes, dict) or not set(FILES) <= set(hashes):
            return f"{HASHES} does not list its files"
        for name, expected in hashes.items():
            if _patiently(partial(sha256_of, path / name)) != expected:
                return f"{name} does not have its hash"
        if _format(path) > 1 and not {f"{TEXT}/config.json", f"{TOKENIZER}/tokenizer_config.json"} <= set(hashes):
            return f"{HASHES} does not list its text encoder"
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError) as error:
        return str(error)
    return ""


def load_state(path: Path) -> TrainState:
    """The TrainState of a verified checkpoint."""
    if (found := _format(path)) not in FORMATS:
        raise ValueError(f"checkpoint {path} has format {found}; this version of Duet reads {FORMATS[-1]}")
    return TrainState(**json.loads((path / STATE).read_text())["state"])


def load_weights(path: Path, model: torch.nn.Module, averaged: bool = False) -> None:
    """Put a checkpoint's weights into a model, or their average; before it is prepared, since ZeRO copies them then."""
    model.load_state_dict(load_part(path, "ema" if averaged else "model"))


def load_part(path: Path, part: str) -> dict[str, Tensor]:
    """Tensors of a verified checkpoint; `part` is a field of `Tensors`."""
    return load_file(path / f"{part}.safetensors")


def find(run: str | Path, step: str = "") -> Path:
    """A checkpoint of a run, the same on all ranks; a collective.

    Args:
        run: a run directory, or one of its checkpoints, which is then the answer.
        step: empty for the newest whole one, `best` for that of `checkpoint.best`, or a number of steps.

    Raises:
        ValueError: there is none; those that there are are named.
    """
    directory = Path(run)
    if (directory / STATE).is_file():
        if step:
            raise ValueError(f"step {step}: {run} is one checkpoint; give its run directory, {directory.parent.parent}")
        return directory
    if not step:
        if found := newest(directory):
            return found
        raise ValueError(f"run {run}: there is no complete checkpoint in {_root(directory)}")
    name = best(directory) if step == "best" else f"step_{int(step):08d}" if step.isdecimal() else ""
    if name and (_root(directory) / name).is_dir():
        return _root(directory) / name
    there = ", ".join(map(str, steps(directory))) or "none"
    hint = "; checkpoint.best has it kept" if step == "best" else ""
    raise ValueError(f"step {step}: {run} has no such checkpoint{hint}. There are: {there}")


def path_of(run_dir: Path, step: int) -> Path:
    """Where a run has the checkpoint of a step, if there is one."""
    return _root(run_dir) / f"step_{step:08d}"


def unfinished(target: Path) -> Path:
    """Where a checkpoint is while it is not complete, or no longer."""
    return target.with_name(f".{target.name}.part")


def complete(run_dir: Path) -> list[Path]:
    """Renamed, so complete, checkpoints; newest first.

    Raises:
        OSError: the directory cannot be read, where `Path.glob` would find nothing.
    """
    root = _root(run_dir)
    names = _patiently(partial(os.listdir, root)) if root.exists() else []
    return sorted((root / name for name in names if re.fullmatch(r"step_.{8}", name)), reverse=True)


def best(run_dir: Path) -> str:
    """Name of the checkpoint that is marked as the best one; empty where none is."""
    path = _root(run_dir) / BEST
    return path.read_text().strip() if path.is_file() else ""


def steps(run_dir: Path) -> list[int]:
    """Steps of which there is a complete checkpoint, in order."""
    return [int(path.name.removeprefix("step_")) for path in reversed(complete(run_dir))]


def load_model(run_dir: str | Path, step: str = "") -> tuple[PairModel, RunConfig]:
    """A model of a run, on the CPU in evaluation mode, and its configuration; averaged, where `optim.ema` is.

    The configuration names the checkpoint's own text encoder and tokenizer.

    Args:
        run_dir: a run directory, or one of its checkpoints.
        step: empty for the newest one, `best`, or a number of steps.

    Raises:
        ValueError: there is no undamaged checkpoint.
    """
    path = find(run_dir, step)
    if damage := verify(path):
        raise ValueError(f"run {run_dir}: the checkpoint is damaged ({damage})")
    config, state = with_own_text(cli.load(path / CONFIG), path), load_state(path)
    model = build_model(config, state.mean, state.std, pretrained=False)
    load_weights(path, model, averaged=config.optim.ema > 0)
    return model.eval(), config


def saved_text_files(path: Path) -> dict[str, bytes]:
    """The text encoder's and tokenizer's files of a verified checkpoint, by name; none in format 1."""
    hashes = json.loads((path / HASHES).read_text())
    return {name: (path / name).read_bytes() for name in hashes if name.startswith((f"{TEXT}/", f"{TOKENIZER}/"))}


def check_text(path: Path, config: RunConfig) -> None:
    """Refuse to resume from a verified checkpoint with another text encoder or tokenizer; a collective.

    Raises:
        ValueError: on all ranks, with the differences.
    """
    problem = ""
    if distributed.is_main():
        try:
            problem = another_text(config, cli.load(path / CONFIG), path)
        except ValueError as error:
            problem = str(error)
    if problem := distributed.broadcast_object(problem):
        further = onward(path.parent.parent, other_towers=True)
        raise ValueError(f"{problem}\nGive the one of before, or choose another `name`{further}.")


def _root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _newest_whole(run_dir: Path) -> Path | None:
    found = complete(run_dir)
    damaged = []
    for path in found:
        if not (damage := verify(path)):
            return path
        damaged.append(f"{path.name}: {damage}")
        if len(damaged) < len(found):
            print(f"checkpoint {path} is damaged ({damage}): trying the one before it", file=sys.stderr, flush=True)
    if damaged:
        raise ValueError(
            f"name {run_dir.name}: all checkpoints in {_root(run_dir)} are damaged:\n  "
            + "\n  ".join(damaged)
            + "\nNothing was changed. Put back whole ones from a copy, or choose another `name` to begin again."
        )
    return None


def _patiently(read: Callable[[], T]) -> T:
    """What `read` returns; called again after OSErrors that may pass."""
    for seconds in RETRY_SECONDS:
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise
        except OSError:
            time.sleep(seconds)
    return read()


def _format(path: Path) -> int:
    return json.loads(_patiently((path / STATE).read_bytes))["format"]
