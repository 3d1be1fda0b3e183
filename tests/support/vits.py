"""Image towers of CLIP's and SigLIP's shape, small enough for a test: classes of timm's own, by their dotted paths."""

from functools import partial

from timm.layers import LayerNorm
from timm.models.vision_transformer import VisionTransformer

SIZES = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}


class Clip(VisionTransformer):
    """That of OpenAI's CLIP: a norm below the blocks, the class token, QuickGELU."""

    def __init__(self, image_size: int) -> None:
        norm = partial(LayerNorm, eps=1e-5)
        super().__init__(img_size=image_size, pre_norm=True, norm_layer=norm, act_layer="quick_gelu", **SIZES)


class Siglip(VisionTransformer):
    """That of SigLIP: no class token, pooled by attention."""

    def __init__(self, image_size: int) -> None:
        super().__init__(img_size=image_size, class_token=False, global_pool="map", act_layer="gelu_tanh", **SIZES)
