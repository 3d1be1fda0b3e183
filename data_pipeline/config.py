"""What the data pipeline can be told: dataclasses, one docstring per field, standard library only.

Fields marked `machine` change where and how fast a run goes, never its batches: a run may be resumed with other values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


def machine(default: Any) -> Any:
    """A field that belongs to the machine, not to the experiment: it may differ when a run is resumed."""
    return field(default=default, metadata={"machine": True})


@dataclass
class Source:
    """One of several training sources, each with its own epochs."""

    data: str
    """Manifest of the source: a manifest.json, or a directory that holds one."""
    weight: float = 1.0
    """Share of every global batch that comes from this source, relative to the other weights."""


@dataclass
class AugmentConfig:
    """Training augmentation: a named policy; each part of it can be set on its own."""

    policy: Literal["none", "light", "standard", "strong", "text_safe"] = "standard"
    """Named set of values for the fields below that are left at null (text_safe: no flips, no rotation)."""
    scale: tuple[float, float] | None = None
    """Smallest and largest share of the image's area that a random resized crop keeps."""
    ratio: tuple[float, float] | None = None
    """Smallest and largest aspect ratio (width / height) of that crop."""
    flip: float | None = None
    """Probability of a horizontal flip."""
    rotation: float | None = None
    """Largest rotation in degrees, either way."""
    jitter: tuple[float, float, float, float] | None = None
    """Colour jitter: largest relative change of brightness, contrast, saturation, and of hue (share of the circle)."""
    jitter_probability: float | None = None
    """Probability that the colour jitter is applied."""
    grayscale: float | None = None
    """Probability of a grayscale image."""
    rand_ops: int | None = None
    """RandAugment (arXiv 1909.13719): operations applied to each image; 0 is off."""
    rand_magnitude: int | None = None
    """RandAugment: magnitude of its operations, 0 to 30."""


@dataclass
class CaptionConfig:
    """How one caption is made of a sample's captions, in training; evaluation takes all of them as they are."""

    sample: Literal["random", "first"] = "random"
    """Which one of several captions a training sample uses."""
    templates: list[str] = field(default_factory=list)
    """Sentences with one {} each, such as "a drawing of {}": one is drawn per sample; empty: the caption alone."""
    template_probability: float = 0.5
    """Probability that a caption is put into a template, where there are any."""
    shuffle_keywords: bool = False
    """Shuffle the comma-separated parts of a caption."""
    drop_keywords: float = 0.0
    """Probability of leaving out each comma-separated part of a caption; at least one part stays."""


@dataclass
class DataConfig:
    """Which samples a run sees, in which order, and what they look like."""

    train: str | list[Source] = machine("")
    """Training data: a manifest.json (or its directory), or a list of sources with weights. The path may differ when a
    run is resumed; what the manifests hold, and the weights, may not."""
    val: str = machine("")
    """Held-out data for evaluation: a manifest.json (or its directory); empty for none."""
    mode: Literal["indexed", "stream"] = "indexed"
    """indexed: exact order through the manifest. stream: webdataset's own reader over shard urls, inexact."""
    image_size: int = 224
    """Height and width of the images that the tower sees, in pixels."""
    max_tokens: int = 77
    """Longest caption in tokens, special tokens included; longer ones are cut."""
    normalize: str | tuple[tuple[float, float, float], tuple[float, float, float]] = "imagenet"
    """Channel statistics: imagenet, dataset (of the training manifest, whose index counts transparent pixels as white
    ones), or [[mean r, g, b], [std r, g, b]], 0 to 1."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour, 0 to 255, that is put behind transparent images."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Training augmentation."""
    eval_crop: float = 1.0
    """Side of the square in the middle that evaluation looks at, as a share of the image's shorter side; above 0, at
    most 1. Random crops show things larger in training: 0.875 makes up for some of that (arXiv 1906.06423)."""
    eval_size: int = 0
    """Height and width of the images in evaluation and in exports, in pixels; 0: image_size. Towers that take images of
    any size often do better with somewhat larger ones than in training (arXiv 1906.06423)."""
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    """Caption policy in training."""
    lanes: int = 8
    """Equal spans that an epoch is cut into, each read in order by the same node; must divide global_batch."""
    shuffle_shards: int = 8
    """Shards of a lane whose samples are shuffled together; larger mixes better, smaller needs less cache."""
    max_pixels: int = 89_478_485
    """Largest image in pixels (width x height) that is decoded; a larger one counts as bad."""
    max_bad_fraction: float = machine(0.01)
    """Share of bad samples over which the run stops."""
    workers: int | None = machine(None)
    """Loader processes per training process; 0 loads in the training process; null: one, or on a GPU as many as each
    process has cores, but one, up to 16."""
    prefetch: int = machine(4)
    """Micro-batches that each loader process prepares ahead, at least; all of them together prepare two steps."""
    cache_dir: str = machine("")
    """Directory of the node-local cache for remote shards; empty: ~/.cache/duet."""
    cache_gb: float = machine(100.0)
    """Size of that cache in GB (1e9 bytes); least recently used shards leave first."""

    @property
    def evaluated_size(self) -> int:
        """Height and width of the images in evaluation and in exports, in pixels."""
        return self.eval_size or self.image_size
