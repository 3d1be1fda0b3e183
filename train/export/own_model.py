"""A pair of an image tower and a text tower, for AutoModel.from_pretrained(DIRECTORY, trust_remote_code=True).

Shapes: B images or captions, C channels, H height, W width, L tokens, D embedding.
"""

from __future__ import annotations

import importlib
import inspect
from collections import OrderedDict  # noqa: F401  of mlp, which is copied to here

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput

from train.model.layers import mlp
from train.model.text import pooled, without_head


class DuetConfig(transformers.PretrainedConfig):
    """How both towers are built: see DuetModel."""

    model_type = "duet"

    def __init__(
        self,
        image_library="timm",
        image_model="resnet18",
        image_options=None,
        image_head="",
        image_width=512,
        image_projection="linear",
        text_class="BertModel",
        text_encoder=None,
        text_pooling="cls",
        text_width=768,
        text_projection="linear",
        projection_bias=False,
        projection_dim=512,
        has_logit_bias=False,
        **kwargs,
    ):
        self.image_library, self.image_model, self.image_options = image_library, image_model, image_options or {}
        self.image_head, self.image_width, self.image_projection = image_head, image_width, image_projection
        self.text_class, self.text_encoder, self.text_pooling = text_class, text_encoder or {}, text_pooling
        self.text_width, self.text_projection = text_width, text_projection
        self.projection_bias, self.projection_dim, self.has_logit_bias = projection_bias, projection_dim, has_logit_bias
        super().__init__(**kwargs)


class DuetModel(transformers.PreTrainedModel):
    """An image tower of timm or torchvision without its classifier, an encoder of transformers, and a projection of
    each into one space."""

    config_class = DuetConfig
    base_model_prefix = "duet"
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.image_model = image_model(config)
        self.text_model = text_model(config)
        self.image_projection = self._projection(config.image_projection, config.image_width)
        self.text_projection = self._projection(config.text_projection, config.text_width)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias = nn.Parameter(torch.zeros(())) if config.has_logit_bias else None
        for module in self.image_model.modules():  # constants are in the file: transformers could not make them again
            module._non_persistent_buffers_set.clear()
        self.post_init()

    def _projection(self, kind, width):
        size, bias = self.config.projection_dim, self.config.projection_bias
        if kind == "mlp":
            return mlp(width, 2 * size, size, bias=bias)
        return nn.Linear(width, size, bias=bias) if kind == "linear" else nn.Identity()

    def get_image_features(self, pixel_values, **kwargs):
        """Normalized images, float [B, 3, H, W] -> pooler_output: [B, D]."""
        features_BD = self.image_projection(self.image_model(pixel_values))
        return BaseModelOutputWithPooling(pooler_output=features_BD)

    def get_text_features(self, input_ids, attention_mask=None, **kwargs):
        """Token ids and mask (1: token, 0: padding), int64 [B, L] -> pooler_output: [B, D]."""
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden_BLD = self.text_model(input_ids=input_ids, attention_mask=mask_BL).last_hidden_state
        features_BD = self.text_projection(pooled(self.text_model, self.config.text_pooling, hidden_BLD, mask_BL))
        return BaseModelOutputWithPooling(last_hidden_state=hidden_BLD, pooler_output=features_BD)

    def forward(self, input_ids=None, pixel_values=None, attention_mask=None, **kwargs):
        """The logits of every image and every text, and the unit vectors of both."""
        image_BD = nn.functional.normalize(self.get_image_features(pixel_values).pooler_output.float(), dim=-1)
        text_BD = nn.functional.normalize(
            self.get_text_features(input_ids, attention_mask).pooler_output.float(), dim=-1
        )
        logits = text_BD @ image_BD.T * self.logit_scale.exp()
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return CLIPOutput(logits_per_image=logits.T, logits_per_text=logits, text_embeds=text_BD, image_embeds=image_BD)


def image_model(config):
    """[B, 3, H, W] -> [B, image_width]."""
    if config.image_library == "timm":
        timm = importlib.import_module("timm")
        return timm.create_model(config.image_model, pretrained=False, num_classes=0, **config.image_options)
    torchvision = importlib.import_module("torchvision")
    model = torchvision.models.get_model(config.image_model, weights=None, **config.image_options)
    model.set_submodule(config.image_head, nn.Identity())
    return model


def text_model(config):
    """The encoder alone."""
    encoder_class = getattr(transformers, config.text_class)
    options = {}
    if "add_pooling_layer" in inspect.signature(encoder_class.__init__).parameters:
        options["add_pooling_layer"] = config.text_pooling == "pooler"
    return without_head(encoder_class(encoder_class.config_class.from_dict(config.text_encoder), **options))
