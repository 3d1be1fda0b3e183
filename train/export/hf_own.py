"""The form of `hf` for a pair that no class of transformers can express: a class of its own, in readable code.

config.json, model.safetensors    a DuetModel
modeling_duet.py                  DuetModel: needs torch, transformers, and timm or torchvision
image_processing_duet.py          DuetImageProcessor: image files -> pixels, as in Duet's evaluation
preprocessor_config.json, tokenizer.json ...    for AutoProcessor
text/config.json                  the text encoder's architecture, for whoever wants it alone
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from train.export import own_model
from train.export.files import preprocessing, standalone
from train.export.own_model import DuetConfig, DuetModel
from train.export.recipe import refuse, with_counters
from train.export.source import Source
from train.model import backbone_timm, backbone_torchvision
from train.model.names import OWN_CODE, outward, timm_name
from train.model.text import KINDS
from train.model.text_files import TEXT

MODEL, PIXELS = "modeling_duet", "image_processing_duet"
"""Names of the files of code."""
AUTO_MAP = {
    "AutoConfig": f"{MODEL}.DuetConfig",
    "AutoModel": f"{MODEL}.DuetModel",
    "AutoModelForZeroShotImageClassification": f"{MODEL}.DuetModel",
}
PROCESSOR = '''

class DuetImageProcessor(BaseImageProcessor):
    """Image files -> `pixel_values`, normalized, as in Duet's evaluation.

    Give paths, or images as PIL.Image.open returns them: of a large JPEG file, the evaluation decodes no more than it
    needs. Images that are decoded already, and arrays [H, W, 3], are taken as they are.
    """

    model_input_names = ["pixel_values"]

    def __init__(self, image_size=224, eval_crop=1.0, background=(0, 0, 0), image_mean=None, image_std=None, **kwargs):
        super().__init__(**kwargs)
        self.image_size, self.eval_crop, self.background = image_size, eval_crop, list(background)
        self.image_mean, self.image_std = image_mean or [0.5] * 3, image_std or [0.5] * 3

    def fetch_images(self, images):
        return images  # which transformers would decode in full

    def preprocess(self, images, return_tensors="pt", **kwargs):
        images = images if isinstance(images, (list, tuple)) else [images]
        options = (self.image_size, self.eval_crop, tuple(self.background))
        pixels = torch.stack([prepare(opened(image), *options) for image in images]).float()
        mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (self.image_mean, self.image_std))
        return BatchFeature({"pixel_values": (pixels / 255 - mean) / std}, tensor_type=return_tensors)


def opened(image):
    """An image that is not decoded yet, where that can be had."""
    if isinstance(image, (str, Path)):
        return open_image(Path(image).read_bytes())
    if not isinstance(image, Image.Image):
        return Image.fromarray(np.asarray(image))
    if not getattr(image, "tile", None) or getattr(image, "fp", None) is None:
        return image
    image.fp.seek(0)  # the caller's image stays as it is
    return open_image(image.fp.read())
'''
FIRST_IMPORTS = "from pathlib import Path\n\nimport numpy as np\n"
LAST_IMPORTS = "from torch.nn import functional\nfrom transformers import BaseImageProcessor, BatchFeature\n"


def check_own(source: Source) -> None:
    """Raises ValueError, naming the field of the recipe that the code does not have."""
    model = source.config.model
    refuse(
        "hf",
        {
            f"model.image.name {model.image.name}": "." in model.image.name,
            f"model.image.norm {model.image.norm}": model.image.norm == "group",
            "model.multiscale.fuse true": model.multiscale.enabled and model.multiscale.fuse,
        },
    )


def write_own(source: Source, directory: Path) -> None:
    """Both files of code, the weights and their config, and the config of the pixels."""
    made = _built(source)
    lacking, _ = made.load_state_dict(outward(with_counters(source), OWN_CODE), strict=False)
    # Constants, which the class makes, and a checkpoint does not have.
    assert set(lacking) <= {name for name, _ in made.named_buffers()}, lacking
    made.save_pretrained(directory)
    (directory / f"{MODEL}.py").write_text(standalone(own_model))
    (directory / TEXT).mkdir()
    (directory / TEXT / "config.json").write_bytes(source.model.text.config_file())
    code = preprocessing().replace("import numpy as np\n", FIRST_IMPORTS, 1)
    code = code.replace("from torch.nn import functional\n", LAST_IMPORTS, 1)
    (directory / f"{PIXELS}.py").write_text(code + PROCESSOR)
    pixels = {
        "image_processor_type": "DuetImageProcessor",
        "processor_class": "VisionTextDualEncoderProcessor",
        "auto_map": {"AutoImageProcessor": f"{PIXELS}.DuetImageProcessor"},
        "image_size": source.image_size,
        "eval_crop": source.config.data.eval_crop,
        "background": list(source.config.data.background),
        "image_mean": source.state.mean,
        "image_std": source.state.std,
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(pixels, indent=2) + "\n")


def _built(source: Source) -> DuetModel:
    """The model with fresh weights."""
    model, encoder = source.config.model, source.model.text.encoder
    kind = KINDS.get(encoder.config.model_type)
    fields: dict[str, Any] = {
        "image_width": source.model.image.width,
        "image_projection": model.image.projection,
        "text_class": kind.encoder if kind else type(encoder).__name__,
        "text_encoder": json.loads(source.model.text.config_file()),
        "text_pooling": model.text.pooling,
        "text_width": source.model.text.width,
        "text_projection": model.text.projection,
        "projection_bias": model.projection_bias,
        "projection_dim": model.embed_dim,
        "has_logit_bias": source.model.logit_bias is not None,
        "auto_map": AUTO_MAP,
    }
    size = source.config.data.image_size
    if name := timm_name(model.image.name):
        return DuetModel(DuetConfig(image_model=name, image_options=backbone_timm.fixed_options(name, size), **fields))
    name = model.image.name.removeprefix("torchvision/")
    fields |= {"image_library": "torchvision", "image_head": backbone_torchvision.head_of(source.model.image.backbone)}
    return DuetModel(
        DuetConfig(image_model=name, image_options=backbone_torchvision.fixed_options(name, size), **fields)
    )
