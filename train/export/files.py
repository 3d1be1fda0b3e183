"""Files that several targets share: the tokenizer, a description of the model, and the preprocessing of images."""

from __future__ import annotations

import ast
import inspect
import json
from pathlib import Path
from types import ModuleType

from data_pipeline.samples import image as image_module
from data_pipeline.samples.transforms import resize
from train.export.source import Source
from train.model.text_files import TOKENIZER

PREPROCESSING = '''

def load(path, size, share, background):
    """An image file as uint8 [3, size, size]: see prepare."""
    with open(path, "rb") as file:
        return prepare(open_image(file.read()), size, share, background)


def prepare(image, size, share, background):
    """An opened image as uint8 [3, size, size]: the square in the middle, `share` of the shorter side, resized."""
    crop = centre_crop(*oriented_size(image), share)
    return resize(load_region(image, crop, size, background), size)
'''


def write_inputs(source: Source, directory: Path, **more: object) -> None:
    """What turns image files and captions into a model's inputs: tokenizer/, preprocessing.py and config.json."""
    write_tokenizer(source, directory / TOKENIZER)
    data = source.config.data
    content = description(source) | {"eval_crop": data.eval_crop, "background": list(data.background), **more}
    (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    (directory / "preprocessing.py").write_text(preprocessing())


def preprocessing() -> str:
    """Source of a module whose `load` opens image files as Duet's evaluation does."""
    source = inspect.getsource(image_module)
    numpy, torch = "import numpy as np\n", "import torch\nfrom torch.nn import functional\n"
    assert numpy in source, "the imports that `resize` needs go beside one that is there"
    source = source.replace(numpy, numpy + torch, 1)
    return source + "\n\n" + inspect.getsource(resize).replace(" -> Tensor", "") + PREPROCESSING


def standalone(module: ModuleType) -> str:
    """A module's source, with the source of what it imports from Duet in place of these imports."""
    lines, parts = inspect.getsource(module).splitlines(keepends=True), []
    imports = [node for node in ast.parse("".join(lines)).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    after = imports[-1].end_lineno or 0
    for node in imports:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("train", "data_pipeline"):
            parts += [inspect.getsource(getattr(module, alias.name)) for alias in node.names]
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or 0) - node.lineno + 1)
    head = "".join(lines[:after]).rstrip("\n")
    return "\n\n\n".join([head, *(part.strip("\n") for part in parts), "".join(lines[after:]).lstrip("\n")])


def description(source: Source) -> dict:
    """What a reader of an export wants to know, as JSON."""
    scale = source.model.log_scale.exp().item()
    bias = source.model.logit_bias
    return {
        "embed_dim": source.config.model.embed_dim,
        "image_size": source.image_size,
        "max_tokens": source.config.data.max_tokens,
        "padding": padding(source),
        "mean": source.state.mean,
        "std": source.state.std,
        "logit_scale": scale,
        "logit_bias": None if bias is None else bias.item(),
        "image_tower": source.config.model.image.name,
        "text_tower": source.config.model.text.name,
        "identity": source.identity,
        "steps": source.steps,
        "averaged": source.averaged,
        "data": source.state.data_hash,
        "code": source.state.code,
    }


def padding(source: Source) -> str:
    """How transformers' tokenizer has to fill captions."""
    return "max_length" if source.tokenizer.fills else "longest"


def write_tokenizer(source: Source, directory: Path) -> None:
    """The tokenizer as transformers reads it."""
    directory.mkdir(exist_ok=True)
    for name, content in source.tokenizer.files().items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
