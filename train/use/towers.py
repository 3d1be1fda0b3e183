"""The two encoders of a run, or of what `train.export --to torch` wrote, ready to embed.

Shape suffixes: B images, M texts, L tokens, C channels, H height, W width, D embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.config import DataConfig
from data_pipeline.samples.transforms import eval_transform
from data_pipeline.tokenizer import Tokenizer
from train.checkpoint import find
from train.engine.precision import autocast
from train.evaluate import chosen_precision
from train.export.source import load_source
from train.model.text_files import TOKENIZER
from train.run.directory import CONFIG

OTHERS = {
    "open_clip_config.json": "open_clip",
    "image.onnx": "onnx",
    "preprocessor_config.json": "hf",
}
"""A file of a directory -> the target of train.export, or the library, that wrote it."""


@dataclass
class Towers:
    """A model on its device, in evaluation mode."""

    path: Path
    """The checkpoint or the exported directory, absolute."""
    identity: str
    """A hash of all that embeddings depend on but the precision; of an export that of the model it was made of."""
    data: DataConfig
    """How images are prepared, and by how many loader processes."""
    tokenizer: Tokenizer
    dims: int
    """D."""
    precision: str
    """fp32 or bf16."""
    batch: int
    """Rows of a forward pass, unless another number is asked for."""
    device: torch.device
    encode_image: Callable[[Tensor], Tensor]
    """uint8 [B, C, H, W] -> unit vectors [B, D]."""
    encode_text: Callable[[Tensor, Tensor], Tensor]
    """Token ids and mask, int64 [M, L] -> unit vectors [M, D]."""

    @torch.no_grad()
    def images(self, images_BCHW: Tensor) -> Tensor:
        """Unit vectors [B, D], float32, on the device."""
        with autocast(self.device, self.precision):
            return self.encode_image(images_BCHW.to(self.device, non_blocking=True)).float()

    @torch.no_grad()
    def tokens(self, ids_ML: Tensor, mask_ML: Tensor, batch: int) -> Tensor:
        """Unit vectors [M, D], float32, on the device, `batch` texts at a time."""
        ids_ML, mask_ML = (each.to(self.device, non_blocking=True) for each in (ids_ML, mask_ML))
        parts = [torch.empty(0, self.dims, device=self.device)]
        for start in range(0, len(ids_ML), batch):
            rows = slice(start, start + batch)
            with autocast(self.device, self.precision):
                parts.append(self.encode_text(ids_ML[rows], mask_ML[rows]).float())
        return torch.cat(parts)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [M, D] of a few texts."""
        return self.tokens(*self.tokenizer(texts), batch=len(texts))

    def image(self, data: bytes) -> Tensor:
        """The unit vector [1, D] of one image file. Raises BadSample."""
        return self.images(eval_transform(self.data)(data)[None])

    def about(self) -> dict[str, Any]:
        """What an index keeps of its model."""
        return {"identity": self.identity, "path": str(self.path), "precision": self.precision}


def load_towers(model: str, step: str = "", *, precision: str = "", device: torch.device) -> Towers:
    """The towers of a run, of one of its checkpoints, or of an exported directory.

    Args:
        step: of a run: `best` or a number of steps; the newest where it is empty.
        precision: fp32 or bf16; as the run was trained where it is empty, and fp32 for an export.

    Raises:
        ValueError: there is no such model, or not one in a form that is read.
    """
    directory = Path(model).expanduser().absolute()
    if (directory / "image.pt2").is_file():
        if step:
            raise ValueError(f"step {step}: {model} is an export, which has one model; leave it out")
        return _exported(directory, precision or "fp32", device)
    if (directory / CONFIG).is_file():
        return _trained(directory, step, precision, device)
    if not directory.is_dir():
        raise ValueError(
            f"model {model}: there is no such directory; give a run, or what train.export --to torch wrote"
        )
    kind = next((kind for name, kind in OTHERS.items() if (directory / name).is_file()), "")
    form = f"in the form of {kind}" if kind else "neither a run nor an export"
    raise ValueError(
        f"model {model} is {form}: give the run, or what comes of: python -m train.export --run RUN --to torch OUT"
    )


def _trained(directory: Path, step: str, precision: str, device: torch.device) -> Towers:
    path = find(directory, step)
    source = load_source(path)
    chosen, _ = chosen_precision(precision, source.state.precision, "no")
    model = source.model.to(device)
    return Towers(
        path=path,
        identity=source.identity,
        data=source.config.data,
        tokenizer=source.tokenizer,
        dims=source.config.model.embed_dim,
        precision=chosen,
        batch=source.config.eval.batch,
        device=device,
        encode_image=model.encode_image,
        encode_text=model.encode_text,
    )


def _exported(directory: Path, precision: str, device: torch.device) -> Towers:
    try:
        about = json.loads((directory / "config.json").read_text())
        data = DataConfig(
            image_size=about["image_size"],
            eval_crop=about["eval_crop"],
            background=tuple(about["background"]),
            max_tokens=about["max_tokens"],
        )
        identity, dims = about["identity"], about["embed_dim"]
        image, text = (_program(directory / f"{name}.pt2", device) for name in ("image", "text"))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"model {directory} is not a whole export ({error}): export it again") from error
    return Towers(
        path=directory,
        identity=identity,
        data=data,
        tokenizer=Tokenizer(str(directory / TOKENIZER), data.max_tokens),
        dims=dims,
        precision=precision,
        batch=64,
        device=device,
        encode_image=image,
        encode_text=text,
    )


def _program(path: Path, device: torch.device) -> Callable[..., Tensor]:
    program = torch.export.load(path)
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    return program.module()
