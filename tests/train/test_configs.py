"""The configurations that people start from: each makes a step with small stand-ins, and says what it needs."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.bert import write_bert
from tests.support.small import write_data
from tests.support.training import finish, saved_step
from tests.support.vocabulary import write_tokenizer
from train import cli
from train.checkpoint import newest
from train.config import RunConfig
from train.memory import GB, plan

CONFIGS = Path(cli.__file__).parent / "configs"
STAND_INS = {  # an image tower of the same kind, and the width of the text tower
    "lit": ("timm/test_vit", 32),
    "quickstart": ("timm/tf_efficientnet_lite0", 384),
    "resnet50_bert": ("resnet18", 32),
    "scratch": ("resnet18", 384),
    "siglip": ("timm/test_vit", 32),
    "vit_b16": ("timm/test_vit", 32),
}

LEARNING = {"lit": {"text"}, "quickstart": {"image"}, "scratch": {"image"}}
"""The towers that learn, where these are not both."""


def small(name: str, directory: Path) -> RunConfig:
    """A configuration with stand-ins for its towers, its data and the size of its batch."""
    image, width = STAND_INS[name]
    config = cli.load(CONFIGS / f"{name}.yaml")
    config.runs_dir, config.tracking.wandb = str(directory / "runs"), "disabled"
    config.data.train = str(write_data(directory / "data", [8]))
    config.data.val, config.data.image_size, config.data.lanes, config.data.workers = "", 32, 1, 0
    config.eval.tasks = []
    write_tokenizer(directory / "text")
    config.model.text.name = write_bert(directory / "text", width=width, vocab_size=100, max_position_embeddings=80)
    config.model.image.name, config.model.image.weights, config.model.text.weights = image, "scratch", "scratch"
    if config.model.image.projection == "none":
        config.model.embed_dim = 64
    config.train.steps, config.train.global_batch, config.train.micro_batch = 2, 4, 2
    config.optim.warmup_steps = 0
    return config


def test_every_configuration_is_tried():
    assert sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.is_symlink()) == sorted(STAND_INS)
    assert (CONFIGS / "seed.yaml").resolve() == CONFIGS / "resnet50_bert.yaml"


@pytest.mark.parametrize("name", STAND_INS)
def test_a_configuration_makes_a_step(name, tmp_path):
    config = small(name, tmp_path)
    assert [step for step, _, _ in finish(config)] == [1, 2] and saved_step(config) == 2
    moments = load_file(newest(Path(config.runs_dir) / config.name) / "optimizer.safetensors")
    learning = {
        tower
        for tower in ("image", "text")
        if any(f"{tower}.backbone." in key or f"{tower}.encoder." in key for key in moments)
    }
    assert learning == LEARNING.get(name, {"image", "text"})
    if name == "quickstart":
        assert {int(stage) for stage in re.findall(r"blocks\.(\d)\.", " ".join(moments))} == {4, 5, 6}


@pytest.mark.parametrize("name", [name for name in STAND_INS if name not in ("quickstart", "scratch")])
def test_a_configuration_says_what_it_needs(name):
    said = re.search(r"([\d.]+) GB a GPU", (CONFIGS / f"{name}.yaml").read_text())
    assert said is not None
    needed = plan(cli.load(CONFIGS / f"{name}.yaml"), world=1, bf16=True).total(0) / GB
    assert float(said[1]) == pytest.approx(needed, rel=0.03)
