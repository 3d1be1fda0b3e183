"""Checkpoints that are complete or absent, and can be resumed under any engine and world size.

    checkpoints/step_00000500/   model.safetensors      parameters and buffers, fp32, by name
                                 optimizer.safetensors  AdamW's moments, by parameter name
                                 ema.safetensors        moving average of the weights, where there is one
                                 state.json             TrainState, the data's hash, versions
                                 config.yaml            the resolved configuration
                                 sha256.json            hash of each of the files above
    checkpoints/latest           name of the newest one

A checkpoint is written under a temporary name, hashed, synced to disk and renamed; then `latest` moves; then old ones
leave.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_pipeline.storage.files import sha256_of, sync, write_atomically
from train import cli, distributed
from train.config import RunConfig
from train.model.pair import PairModel, build_model

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "config.yaml")


@dataclass
class TrainState:
    """All that a resumed run needs besides weights and moments: the order is a function of the step."""

    step: int = 0
    """Steps done; the next one is `step`."""
    samples_seen: int = 0
    """Rows of all global batches so far."""
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
    mean: list[float] = field(default_factory=list)
    """Channel means that images are normalized with, 0 to 1."""
    std: list[float] = field(default_factory=list)
    """Channel standard deviations that images are normalized with, 0 to 1."""
    balance: dict[str, float] = field(default_factory=dict)
    """What modality balance has measured, and the multipliers of the learning rates."""


@dataclass
class Tensors:
    """What is saved of a model in training, by parameter name, on the CPU; empty on ranks other than 0."""

    model: dict[str, Tensor]
    """Parameters and buffers, whole."""
    optimizer: dict[str, Tensor]
    """AdamW's moments; empty before the first update."""
    ema: dict[str, Tensor]
    """Moving average of the weights; empty without `optim.ema`."""


def save(run_dir: Path, tensors: Tensors, state: TrainState, config: RunConfig) -> Path:
    """Write a checkpoint of this step and drop the oldest over `checkpoint.keep`; a collective.

    Raises:
        ValueError: on all ranks, where the directory cannot be written; earlier checkpoints stay as they are.
    """
    target = _root(run_dir) / f"step_{state.step:08d}"
    problem = None
    if distributed.is_main():
        try:
            _sweep(run_dir)
            _write(target, tensors, state, config)
            _prune(target, config.checkpoint.keep)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(_part(target), ignore_errors=True)
            problem = f"checkpoint {target} could not be written: {error}; free or mend the disk and start again"
    if problem := distributed.broadcast_object(problem):
        raise ValueError(problem)
    return target


def newest(run_dir: Path) -> Path | None:
    """The newest checkpoint whose files have their hashes, the same on all ranks; a collective.

    Damaged ones are named on the screen and passed over.

    Raises:
        ValueError: on all ranks, where some of them do not see it.
    """
    found = None
    if distributed.is_main():
        for path in _complete(run_dir):
            if damage := verify(path):
                print(f"checkpoint {path} is damaged ({damage}): trying the one before it", file=sys.stderr, flush=True)
            else:
                found = path
                break
    found = distributed.broadcast_object(found)
    if found is not None and distributed.any_rank(not (found / "state.json").is_file()):
        raise ValueError(f"--runs_dir: {found} is not on every host: give a directory on a file system that they share")
    return found


def verify(path: Path) -> str:
    """What is wrong with a checkpoint's files; empty where all is well."""
    try:
        hashes = json.loads((path / "sha256.json").read_text())
        if not isinstance(hashes, dict) or set(hashes) != set(FILES):
            return "sha256.json does not list its files"
        for name, expected in hashes.items():
            if sha256_of(path / name) != expected:
                return f"{name} does not have its hash"
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def load_state(path: Path) -> TrainState:
    """The TrainState of a verified checkpoint."""
    content = json.loads((path / "state.json").read_text())
    if content["format"] != FORMAT:
        raise ValueError(f"checkpoint {path} has format {content['format']}; this version of Duet reads {FORMAT}")
    return TrainState(**content["state"])


def load_weights(path: Path, model: torch.nn.Module, averaged: bool = False) -> None:
    """Put a checkpoint's weights into a model, or their average; before it is prepared, since ZeRO copies them then."""
    model.load_state_dict(load_part(path, "ema" if averaged else "model"))


def load_part(path: Path, part: str) -> dict[str, Tensor]:
    """Tensors of a verified checkpoint; `part` is a field of `Tensors`."""
    return load_file(path / f"{part}.safetensors")


def load_model(run_dir: str | Path) -> tuple[PairModel, RunConfig]:
    """The newest model of a run, on the CPU in evaluation mode, and its configuration; averaged, where `optim.ema` is.

    Args:
        run_dir: a run directory, or one of its checkpoints.

    Raises:
        ValueError: there is no undamaged checkpoint.
    """
    directory = Path(run_dir)
    path = directory if (directory / "state.json").is_file() else newest(directory)
    if path is None:
        raise ValueError(f"--run {run_dir}: there is no complete checkpoint in {_root(directory)}")
    if damage := verify(path):
        raise ValueError(f"--run {run_dir}: the checkpoint is damaged ({damage})")
    config, state = cli.load(path / "config.yaml"), load_state(path)
    model = build_model(config, state.mean, state.std, pretrained=False)
    load_weights(path, model, averaged=config.optim.ema > 0)
    return model.eval(), config


def _root(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def _part(target: Path) -> Path:
    """Where a checkpoint stands that is not complete, or not any more."""
    return target.with_name(f".{target.name}.part")


def _complete(run_dir: Path) -> list[Path]:
    """Renamed, so complete, checkpoints; newest first."""
    return sorted((p for p in _root(run_dir).glob("step_????????") if p.is_dir()), reverse=True)


def _write(target: Path, tensors: Tensors, state: TrainState, config: RunConfig) -> None:
    temporary = _part(target)
    temporary.mkdir(parents=True)
    for part in fields(Tensors):
        save_file(getattr(tensors, part.name), temporary / f"{part.name}.safetensors")
    content = {"format": FORMAT, "state": asdict(state), "torch": str(torch.__version__)}
    (temporary / "state.json").write_text(json.dumps(content, indent=2) + "\n")
    (temporary / "config.yaml").write_text(cli.to_yaml(config))
    hashes = {name: sha256_of(temporary / name) for name in FILES}
    (temporary / "sha256.json").write_text(json.dumps(hashes, indent=2) + "\n")
    for name in (*FILES, "sha256.json"):
        sync(temporary / name)
    sync(temporary)
    if target.exists():  # the same step again, after a restart from an older one
        shutil.rmtree(target)
    temporary.rename(target)
    write_atomically(target.with_name("latest"), target.name + "\n")
    sync(target.parent)


def _sweep(run_dir: Path) -> None:
    """Drop what an interrupted save or removal left; before a save, which may need the room and the names."""
    for path in _root(run_dir).glob(".step_*.part"):
        shutil.rmtree(path, ignore_errors=True)


def _prune(target: Path, keep: int) -> None:
    """Drop what is older than the `keep` newest up to `target`, which was just saved.

    Later ones, which can only be there because they were passed over as damaged, must not push it out.
    """
    kept = [path for path in _complete(target.parent.parent) if path.name <= target.name]
    for path in kept[keep:] if keep else []:
        # First out of the name that marks it complete: an interrupted removal must not look like a checkpoint.
        shutil.rmtree(path.rename(_part(path)))
