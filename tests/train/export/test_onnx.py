"""ONNX files: verified from image files on, of free batch and length, in two precisions."""

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.checkpoints import write_run
from train.config import RunConfig
from train.export.__main__ import main
from train.export.source import load_source

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def test_both_precisions_take_any_batch_and_length(config: RunConfig, tmp_path: Path, capsys) -> None:
    given, out = replace(config, model=deepcopy(config.model), runs_dir=str(tmp_path / "runs")), tmp_path / "out"
    given.model.image.projection = given.model.text.projection = "mlp"
    run = write_run(given, steps=1)
    assert main(["--run", str(run), "--to", "onnx", str(out)]) == 0
    said = capsys.readouterr().out
    assert "fp32: least cosine" in said and re.search(r"fp16: least cosine image (1\.0000|0\.9999)", said)
    source, generator = load_source(run), torch.Generator().manual_seed(0)
    images_BCHW = torch.randint(0, 256, (5, 3, 64, 64), generator=generator, dtype=torch.uint8)
    ids_BL = torch.randint(5, 50, (3, 19), generator=generator)
    mask_BL = (torch.arange(19) < torch.tensor([[19], [7], [2]])).long()
    with torch.no_grad():
        wanted = source.model.encode_image(images_BCHW), source.model.encode_text(ids_BL, mask_BL)
    inputs = {"images": images_BCHW.numpy()}, {"ids": ids_BL.numpy(), "mask": mask_BL.numpy()}
    for suffix, tolerance in (("", 1e-5), ("_fp16", 5e-3)):
        for name, given_to, wanted_BD in zip(("image", "text"), inputs, wanted, strict=True):
            found = onnxruntime.InferenceSession(out / f"{name}{suffix}.onnx").run(None, given_to)[0]
            assert found.dtype == np.float32
            assert np.abs(found - wanted_BD.numpy()).max() < tolerance, name + suffix
    for path in out.glob("*.onnx"):
        onnx.checker.check_model(path, full_check=True)
    half = onnx.load(out / "image_fp16.onnx")
    kinds = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
    convolutions = [kinds[node.input[1]] for node in half.graph.node if node.op_type == "Conv"]
    assert convolutions[0] == onnx.TensorProto.FLOAT and convolutions[-1] == onnx.TensorProto.FLOAT16
    assert (out / "image_fp16.onnx").stat().st_size < 0.6 * (out / "image.onnx").stat().st_size
