"""Pretrained weights: local files, torchvision's, timm's, the Hugging Face hub's.

What cannot be loaded or fetched is reported within seconds, with a remedy.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
import torchvision
from torch import Tensor, nn
from transformers.utils import logging

from data_pipeline.storage.download import download
from data_pipeline.storage.hub import TEXTS, WEIGHTS, fetch
from data_pipeline.tokenizer import first_line
from train import distributed
from train.model.weights_file import read_weights

BUILT_IN_BERT = ("bert-base-uncased", "google-bert/bert-base-uncased")
TEXT_REMEDY = (
    "give a directory with its config.json and model.safetensors; model.text.weights scratch needs the config.json "
    "alone, and no file at all for bert-base-uncased"
)


def read_state_dict(weights: str) -> dict[str, Tensor] | None:
    """The tensors of a local .safetensors or .pth file by name; None where `weights` does not name a file.

    Of a pair of open_clip's, or a checkpoint of Duet's, those of the image tower.

    Args:
        weights: `model.image.weights`.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path = Path(weights)
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        return None
    try:
        state = read_weights(path)
    except ValueError as error:
        raise ValueError(f"model.image.weights {error}") from error
    for prefix in ("visual.trunk.", "image.backbone."):
        if inside := {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}:
            return inside
    return state


def torchvision_weights(model: str, weights: str) -> dict[str, Tensor]:
    """The state dict of torchvision's weights of that name.

    Raises:
        ValueError: the model has none of that name, or they cannot be fetched.
    """
    given = f"model.image.weights {weights}"
    members = torchvision.models.get_model_weights(model).__members__
    if weights not in members:
        near = difflib.get_close_matches(weights.upper(), members, n=1, cutoff=0.6)
        meant = f"did you mean {near[0]}? " if near else ""
        known = ", ".join(["scratch", *members])
        raise ValueError(f"{given}: {meant}{model} has {known}; or give a local .safetensors or .pth file")
    try:
        _into_cache(members[weights].url)
        return members[weights].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, ValueError) as error:
        remedy = "give a local .safetensors or .pth file, or scratch"
        raise ValueError(f"{given} cannot be fetched from {members[weights].url} ({error}): {remedy}") from error


def tags_of(timm: Any, model: str) -> list[str]:
    """The names of a timm model's weights, as `model.image.weights` has them."""
    return [full.partition(".")[2] for full in timm.list_pretrained([model, f"{model}.*"])]


def timm_weights(timm: Any, model: str, weights: str) -> dict[str, Tensor]:
    """The state dict of one of timm's tags, from the cache of the Hugging Face hub or the hub itself.

    Args:
        timm: the package.
        weights: a tag, such as a1_in1k, or DEFAULT for the one that timm takes.

    Raises:
        ValueError: the model has no such tag, or it cannot be fetched.
    """
    given = f"model.image.weights {weights}"
    tags = tags_of(timm, model)
    known = f"the tags of timm/{model} are {', '.join(tags)}" if tags else f"timm has no weights of {model}"
    if not tags or weights not in ("DEFAULT", *tags):
        near = difflib.get_close_matches(weights, tags, n=1, cutoff=0.6)
        known = f"did you mean {near[0]}? {known[0].upper()}{known[1:]}" if near else known
        raise ValueError(f"{given}: {known}; give DEFAULT, a tag, scratch, or a local .safetensors or .pth file")
    source = timm.models.get_pretrained_cfg(model if weights == "DEFAULT" else f"{model}.{weights}")
    page = f"https://huggingface.co/{source.hf_hub_id}" if source.hf_hub_id else source.url
    try:
        if not source.hf_hub_id:
            return read_weights(_into_cache(source.url))
        return read_weights(Path(_hub_file(source.hf_hub_id, source.hf_hub_filename or "model.safetensors")))
    except Exception as error:  # the hub's client has many kinds of failure, which differ between its versions
        raise ValueError(
            f"{given} cannot be fetched from {page} ({error}): copy the model.safetensors there to this machine "
            f"and set model.image.weights to its path, or to scratch; {known}"
        ) from error


def _into_cache(url: str) -> Path:
    """The file of torch's own cache of weights, fetched where it is missing; its name ends in digits of its hash."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
    if not path.is_file():
        digits = re.search(r"-([0-9a-f]{8,})\.", path.name)
        download(url, path, digits[1] if digits else "")
    return path


def _hub_file(repository: str, filename: str) -> str:
    """Path of a file in the hub's cache; only where it is missing is the hub asked."""
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repository, filename, local_files_only=True)
    except Exception:  # not in the cache; the client's kinds of failure differ between its versions
        return str(fetch(repository, [filename]) / filename)


def load_weights(
    module: nn.Module,
    state: dict[str, Tensor],
    by_name: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    given: str,
    model: str,
) -> None:
    """Puts the tensors of a state dict into a module: all of them by name, or else all of them in their order.

    In order they go where every one has the shape and the last part of the name (weight, bias, running_mean) of the
    module's own; after them only a classifier, a matrix and its bias, may be left. It says so.

    Args:
        by_name: gives the file's tensors the module's names, and leaves the classifier out.
        given: the field that named the file, with its value.
        model: `model.image.name`.

    Raises:
        ValueError: tensors are missing, of another shape, or not in the module.
    """
    own = module.state_dict()
    try:
        named = by_name(state)
    except Exception as error:  # whatever translates a file of another model may fail in any way
        named, problem = {}, repr(error)
    else:
        problem = _differences(own, named)
    if problem:
        named = _in_order(own, state)
        if not named:
            raise ValueError(f"{given} are not weights of {model}: {problem}")
        if distributed.is_main():
            print(
                f"{given}: the {len(named)} tensors have other names than those of {model}; "
                "they were matched in order, each by its shape",
                file=sys.stderr,
                flush=True,
            )
    module.load_state_dict(named, strict=False)


def _differences(own: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """What keeps a state dict from being that of a module, in words; empty where nothing does."""
    parts = {
        "missing": [name for name in own if name not in state and not _is_counter(name)],
        "of another shape": [name for name in own if name in state and own[name].shape != state[name].shape],
        "not in the model": [name for name in state if name not in own],
    }
    return "; ".join(f"{len(names)} {what} ({names[0]} ...)" for what, names in parts.items() if names)


def _in_order(own: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `state` under the names of `own` where they are the same in order; empty where they are not."""
    names = [name for name in own if not _is_counter(name)]
    given = [name for name in state if not _is_counter(name)]
    head = [state[name].shape for name in given[len(names) :]]
    if [len(shape) for shape in head] not in ([], [2], [2, 1]):
        return {}
    pairs = list(zip(names, given, strict=False))
    same = len(pairs) == len(names) and all(
        own[name].shape == state[other].shape
        and name.rpartition(".")[2] == other.rpartition(".")[2]
        and (other not in own or other == name)
        for name, other in pairs
    )
    return {name: state[other] for name, other in pairs} if same else {}


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def from_hub(load: Callable[..., Any], name: str, weights: bool = False) -> Any:
    """What `load` returns for a directory or for files in the local cache; the hub is asked only without either, once.

    Code that lies beside the files is never run: `load` is told not to trust it, so it cannot ask a terminal either.

    Args:
        load: a `from_pretrained` of transformers.
        name: `model.text.name`.
        weights: whether it needs them.

    Raises:
        ValueError: the directory does not hold what is loaded, or the hub does not have it or cannot be reached.
    """
    with _quiet():
        try:
            return load(name, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # each file format has its own kinds of damage
            if Path(name).is_dir():
                problem = f"model.text.name {name}: cannot be loaded from this directory: {first_line(error)}"
                raise ValueError(f"{problem}; {TEXT_REMEDY}") from error
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ValueError(f"model.text.name {name}: no such directory; {TEXT_REMEDY}")
        try:
            fetch(name, TEXTS, WEIGHTS if weights else ())
            return load(name, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # the hub's client has many kinds of failure, which differ between its versions
            problem = f"model.text.name {name} cannot be fetched from the Hugging Face hub ({first_line(error)})"
            raise ValueError(f"{problem}; {TEXT_REMEDY}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers from showing, on every rank, its bars and its warnings of tensors left out on purpose."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
