"""All terms together: their heads have the names that checkpoints know."""

from data_pipeline.stages.decode import Extras
from tests.support.exactness import write_text_tower
from tests.train.model.test_model import MEAN, STD, small_config
from train import terms
from train.config import ModelConfig, RunConfig
from train.model.pair import build_model
from train.terms.objective import Objective

SIDE = (
    "gates_n",
    *(f"pools.{level}.{name}" for level in range(3) for name in ("query_hC", "value_hCd", "projection.weight")),
    *("cross.norm.weight", "cross.norm.bias", "cross.query_key_value.weight", "cross.projection.weight"),
)
HEADS = [
    *("log_scale", "logit_bias", "level_log_scales", "level_biases", "level_logits", "mean", "std"),
    *("image_projection.weight", "text_projection.weight"),
    *(f"{tower}_levels.{name}" for tower in ("image", "text") for name in SIDE),
    *(f"image_ssl.layers.{layer}.{name}" for layer in (0, 1, 3) for name in ("weight", "bias")),
    *("text_ssl.bias_V", "text_ssl.layer.weight", "text_ssl.layer.bias", "text_ssl.norm.weight", "text_ssl.norm.bias"),
]


def test_checkpoints_keep_the_names_of_all_heads(tmp_path):
    config = small_config(write_text_tower(tmp_path))
    config.loss.kind = "sigmoid"
    levels, ssl = config.model.multiscale, config.model.self_supervision
    levels.enabled = levels.cross_level = levels.fuse = True
    ssl.image, ssl.text = 0.5, 0.25
    names = list(build_model(config, MEAN, STD).state_dict())
    assert [name for name in names if not name.startswith(("image.", "text."))] == HEADS


def test_the_loader_makes_what_terms_ask_for_and_nothing_else():
    config = ModelConfig()
    assert Extras(**terms.extras(config)) == Extras()
    config.self_supervision.text, config.self_supervision.mask = 0.25, 0.3
    assert Extras(**terms.extras(config)) == Extras(mask=0.3)
    config.self_supervision.image = 0.5
    assert Extras(**terms.extras(config)) == Extras(second_view=True, mask=0.3)


def test_ranks_gather_what_a_part_of_the_loss_needs_and_nothing_else():
    config, texts, views = RunConfig(), {"text", "text_levels"}, {"view", "other_view"}
    names = [*texts, *views, "image", "image_levels", "words_loss", "words_count"]

    def gathered() -> set[str]:
        return {name for name in names if Objective(config).gathers(name)}

    assert gathered() == {"text"}
    config.model.multiscale.enabled = True
    assert gathered() == texts
    config.loss.rows = "full"
    assert gathered() == {*texts, "image", "image_levels"}
    config.loss.rows, config.loss.kind = "tiled", "sigmoid"
    config.model.self_supervision.image = config.model.self_supervision.text = 0.5
    assert gathered() == {*texts, *views, "words_loss", "words_count"}
