"""open_clip's own towers, tiny, in a directory that open_clip itself loads: the same embeddings here."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.open_clip import interpreter
from tests.support.vocabulary import write_clip_tokenizer
from train import cli
from train.init.fit import fill
from train.init.origin import open_origin
from train.model.pair import build_model

VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 16, "vocab_size": 90, "width": 32, "heads": 2, "layers": 2}
KINDS: dict = {"plain": {}, "custom": {}, "siglip": {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}}
SAVE = """
import json, sys
import open_clip, torch
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import load_file, save_file

directory, custom = sys.argv[1], sys.argv[2] != "plain"
content = json.load(open(f"{directory}/open_clip_config.json"))
torch.manual_seed(3)
made = (CustomTextCLIP if custom else CLIP)(**content["model_cfg"])
for name, parameter in made.named_parameters():
    if parameter.ndim:
        torch.nn.init.normal_(parameter, float(parameter.ndim == 1 and "weight" in name), 0.2)
save_file({name: tensor.contiguous() for name, tensor in made.state_dict().items()},
          f"{directory}/open_clip_model.safetensors")
if custom:
    content["model_cfg"]["custom_text"] = True
    json.dump(content, open(f"{directory}/open_clip_config.json", "w"))
model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{directory}")
inputs = load_file(f"{directory}/inputs")
with torch.no_grad():
    image = model.eval().encode_image(inputs["pixels"], normalize=True)
    text = model.encode_text(inputs["ids"], normalize=True)
save_file({"image": image, "text": text, "scale": model.logit_scale.detach().reshape(1)}, f"{directory}/outputs")
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "custom", "siglip"])
def test_embeddings_are_those_of_open_clip(kind: str, tmp_path: Path) -> None:
    content = {
        "model_cfg": {"embed_dim": 24, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT | KINDS[kind]},
        "preprocess_cfg": {"size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.2]},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    generator = torch.Generator().manual_seed(1)
    images_BCHW = torch.randint(0, 256, (3, 3, 32, 32), generator=generator).byte()
    lengths_B1 = torch.tensor([[16], [5], [9]])
    ids_BL = torch.randint(1, 88, (3, 16), generator=generator)
    ids_BL[torch.arange(16) == lengths_B1 - 1] = 89  # the end of the text
    mask_BL = (torch.arange(16) < lengths_B1).long()
    ids_BL = ids_BL * mask_BL
    if kind == "siglip":  # reads its padding
        mask_BL = torch.ones_like(mask_BL)
    config = cli.parse(["--data.image_size=32", "--data.max_tokens=16", f"--init=open_clip:{tmp_path}"])
    config.model.image.name = "tests.support.vits.Clip"
    config.model.text.tokenizer = str(write_clip_tokenizer(tmp_path / "tokenizer"))
    mean, std = content["preprocess_cfg"]["mean"], content["preprocess_cfg"]["std"]
    pixels_BCHW = (images_BCHW / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    save_file({"pixels": pixels_BCHW, "ids": ids_BL}, tmp_path / "inputs")
    command = [interpreter(), "-I", "-c", SAVE, str(tmp_path), kind]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    with pytest.raises(ValueError, match=r"model\.text\.pooling last    \(now it is cls\)") as caught:
        open_origin(config)
    assert f"model.text.name {tmp_path} " in str(caught.value) and "model.embed_dim 24" in str(caught.value)
    config.model.text.name, config.model.text.pooling, config.model.embed_dim = str(tmp_path), "last", 24
    config.model.projection_bias = kind == "siglip"
    model = build_model(config, mean, std, pretrained=False).eval()
    lines = fill(model, open_origin(config), config)
    assert not [line for line in lines if line.startswith("fresh")], lines
    expected = load_file(tmp_path / "outputs")
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images_BCHW), expected["image"], rtol=0, atol=1e-6)
        torch.testing.assert_close(model.encode_text(ids_BL, mask_BL), expected["text"], rtol=0, atol=1e-6)
    assert torch.equal(model.log_scale.detach(), expected["scale"]) and model.text.reads_padding == (kind == "siglip")
