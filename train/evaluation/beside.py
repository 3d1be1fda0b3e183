"""What CLIP_benchmark writes beside the data of a set: which task it is for, the names of its classes, sentences.

A set is a folder with these files and one folder of shards per split (`test/0.tar`); so they are looked for in the
folder of the manifest and in the one above it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from data_pipeline.storage.manifest import load_manifest
from data_pipeline.storage.remote import is_remote
from train.config import EvalTask

TYPE = "dataset_type.txt"
KINDS = {"retrieval": "retrieval", "classification": "zeroshot"}
"""What TYPE says -> the task."""
FILES = {"classnames": "classnames.txt", "templates": "zeroshot_classification_templates.txt"}
"""Fields of a zero-shot task -> the files that stand in where the field is empty."""


def completed(given: EvalTask) -> EvalTask:
    """`given`, with a task and the files of a zero-shot task where it names none: as they are beside its data.

    Where nothing is there the task is retrieval; zero-shot where there are names of classes, and no captions.

    Raises:
        ValueError: the set is for a task that none of these is.
    """
    kind = given.task
    if not kind:
        said = beside(given.data, TYPE)
        word = said.read_text(encoding="utf-8-sig").strip().lower() if said else ""
        if word == "multilabel":
            raise ValueError(
                f"`data` {given.data}: {said} says multilabel, and several classes per image (npy) are not read; "
                "give other data"
            )
        kind = KINDS.get(word, "zeroshot" if not said and _is_of_classes(given.data) else "retrieval")
    given = replace(given, task=kind)
    for field, name in FILES.items() if kind == "zeroshot" else ():
        setattr(given, field, getattr(given, field) or str(beside(given.data, name) or ""))
    return given


def _is_of_classes(data: str) -> bool:
    """Whether a set has names of classes beside it and no captions: no file says that a set is for classification."""
    if not beside(data, FILES["classnames"]):
        return False
    manifest = load_manifest(data)
    return manifest.statistics.get("uncaptioned") == manifest.nsamples


def beside(data: str, name: str) -> Path | None:
    """The file of this name that belongs to a local data set; None where there is none.

    data: a manifest, its folder, or a tar.
    """
    if not data or is_remote(data):
        return None
    place = Path(data).expanduser().absolute()
    folder = place if place.is_dir() else place.parent
    return next((path for path in (folder / name, folder.parent / name) if path.is_file()), None)
