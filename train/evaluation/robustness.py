"""How a task's metrics fall as its images get worse: noise, blur, JPEG and loss of colour, each in five severities.

The images are those that the tower sees, cropped and resized. Strengths of noise, blur and JPEG are those of
ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261), whose blur is in pixels of an image of 224 and scales with it.
What is drawn for an image depends on the seed and on its key alone.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from data_pipeline.batch import EvalBatch
from data_pipeline.samples.text import name_bytes
from train.evaluation.encode import Encoder
from train.evaluation.task import Task

Curves = dict[str, list[dict[str, float]]]
"""Corruption -> the metrics at severity 1, 2, ..."""
THREADS = 4


def noise(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian noise; strength: its standard deviation, as a share of the range of pixels."""
    pixels = np.asarray(image) / 255 + strength * rng.standard_normal((image.height, image.width, 3))
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def blur(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Gaussian blur; strength: its standard deviation in pixels of an image of 224."""
    return image.filter(ImageFilter.GaussianBlur(strength * image.width / 224))


def jpeg(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Saved as a JPEG and read again; strength: its quality."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=int(strength))
    return Image.open(data).convert("RGB")


def grey(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Between the image and its luminance; strength: the share of the latter."""
    return Image.blend(image, image.convert("L").convert("RGB"), strength)


Corrupt = Callable[[Image.Image, float, np.random.Generator], Image.Image]
CORRUPTIONS: dict[str, tuple[Corrupt, Sequence[float]]] = {
    "noise": (noise, (0.08, 0.12, 0.18, 0.26, 0.38)),
    "blur": (blur, (1, 2, 3, 4, 6)),
    "jpeg": (jpeg, (25, 18, 15, 10, 7)),
    "grey": (grey, (0.2, 0.4, 0.6, 0.8, 1.0)),
}
"""Name -> what it does to an RGB image, and how strongly at each severity from 1 on."""


class Corruption:
    """Changes the images of a batch: one of CORRUPTIONS, at a severity from 1 on."""

    def __init__(self, name: str, severity: int, seed: int):
        self.name, self.severity, self.seed = name, severity, seed
        self.corrupt, strengths = CORRUPTIONS[name]
        self.strength = strengths[severity - 1]

    def __call__(self, batch: EvalBatch) -> Tensor:
        """uint8 [B, 3, H, W]."""
        with ThreadPoolExecutor(THREADS) as pool:
            changed = list(pool.map(self.image, batch.images_BCHW.permute(0, 2, 3, 1).numpy(), batch.keys))
        return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2)

    def image(self, pixels_HWC: np.ndarray, key: str) -> np.ndarray:
        """The corrupted image of the sample with this key; uint8 [H, W, 3] both."""
        drawn = hashlib.sha256(f"{self.seed} {self.name} {self.severity} ".encode() + name_bytes(key)).digest()
        rng = np.random.default_rng(int.from_bytes(drawn[:8], "big"))
        image = Image.fromarray(np.ascontiguousarray(pixels_HWC))
        return np.asarray(self.corrupt(image, self.strength, rng))


def chosen(names: str) -> list[str]:
    """The corruptions of a list with commas; all of them for `all`. Raises ValueError for one that there is not."""
    wanted = list(CORRUPTIONS) if names == "all" else names.split(",")
    for name in wanted:
        if name not in CORRUPTIONS:
            raise ValueError(f"corrupt {name}: give all, or some of {','.join(CORRUPTIONS)}")
    return wanted


def curves(task: Task, encoder: Encoder, names: Sequence[str], seed: int) -> Curves:
    """The metrics of `task.scores` at every severity; all processes call it together.

    Images of the task's own data are changed, also where it fits a part of them; those of other `fit` data are not.
    """
    found: Curves = {}
    for name in names:
        found[name] = []
        for severity in range(1, 1 + len(CORRUPTIONS[name][1])):
            with encoder.changed(task.manifest, Corruption(name, severity, seed)):
                metrics = task.measure(encoder).metrics
            found[name].append({metric: metrics[metric] for metric in task.scores})
    return found
