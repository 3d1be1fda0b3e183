"""Target `onnx`: both encoders for any ONNX runtime, in fp32 and in fp16, opset 18.

image.onnx, text.onnx              `images`, uint8 [B, 3, H, W]; or `ids` and `mask`, int64 [B, L]
image_fp16.onnx, text_fp16.onnx    -> `features`, float32 unit vectors [B, D]; B and L are free
tokenizer/, config.json            as in the target `torch`
preprocessing.py                   image files -> uint8 tensors; the normalization of pixels is in the model
"""

from __future__ import annotations

import math
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from train.export.apart import embed_apart
from train.export.files import write_inputs
from train.export.pairs import ROUGH_TIE, Features
from train.export.programs import programs
from train.export.source import Source
from train.export.target import Target

OPSET = 18
INPUTS = {"image": ["images"], "text": ["ids", "mask"]}
# Sums of squares leave the range of fp16.
STAY_FP32 = ("ReduceL2", "ReduceMean", "LayerNormalization", "Pow")
FIRST = 0.02
"""Share of a tower's weights, from its input on, that stay fp32: all else builds on what these make of the pixels."""
EMBED = """
sys.path.insert(0, directory)
import onnxruntime
from pathlib import Path
from transformers import AutoTokenizer
from preprocessing import load

config = json.loads(Path(directory, "config.json").read_text())
tokenizer = AutoTokenizer.from_pretrained(Path(directory, "tokenizer"))
image, text = (onnxruntime.InferenceSession(Path(directory, f"{name}SUFFIX.onnx")) for name in ("image", "text"))


def images(paths):
    options = (config["image_size"], config["eval_crop"], tuple(config["background"]))
    pixels = torch.stack([load(path, *options) for path in paths])
    return torch.from_numpy(image.run(None, {"images": pixels.numpy()})[0])


def texts(captions):
    options = {"padding": config["padding"], "truncation": True, "max_length": config["max_tokens"]}
    tokens = tokenizer(captions, **options, return_tensors="np")
    ids = tokens["input_ids"]
    mask = tokens.get("attention_mask", ids * 0 + 1)
    return torch.from_numpy(text.run(None, {"ids": ids, "mask": mask})[0])
"""


class OnnxTarget(Target):
    """See the module."""

    def __init__(self, python: str = "") -> None:
        super().__init__(python)
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ValueError(f"to onnx: {error.name} is missing; pip install onnx onnxscript onnxruntime") from error

    def check(self, source: Source) -> None:
        """Every model can be traced."""

    def write(self, source: Source, directory: Path) -> None:
        import onnx

        for name, program in programs(source.model, source.image_size).items():
            made = torch.onnx.export(
                program,
                opset_version=OPSET,
                input_names=INPUTS[name],
                output_names=["features"],
                dynamo=True,
                verbose=False,
            )
            assert made is not None
            made.save(directory / f"{name}.onnx")
            onnx.save(in_half(made.model_proto), directory / f"{name}_fp16.onnx")
        write_inputs(source, directory, opset=OPSET)

    def embed(self, source: Source, directory: Path, images: list[Path], captions: list[str]) -> dict[str, Features]:
        given = (sys.executable, directory, images, captions)
        single = embed_apart(EMBED.replace("SUFFIX", ""), *given)
        half = embed_apart(EMBED.replace("SUFFIX", "_fp16"), *given)
        return {"fp32": single, "fp16": half._replace(tie=ROUGH_TIE)}


def in_half(model: Any) -> Any:
    """The model (onnx.ModelProto, which is used up) in fp16, but for its first layers and its last normalization."""
    from onnxruntime.transformers import float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    del model.graph.value_info[:]  # by which it would take weights that stay fp32 for fp16, and cast them
    kept = [*float16.DEFAULT_OP_BLOCK_LIST, *STAY_FP32]
    options = {"op_block_list": kept, "node_block_list": _ends(model.graph)}
    half = OnnxModel(float16.convert_float_to_float16(model, keep_io_types=True, **options))
    # Between two nodes in fp32 it would round to fp16 and back.
    half.remove_cascaded_cast_nodes()
    half.topological_sort()
    return half.model


def _ends(graph: Any) -> list[str]:
    """Names of the nodes that take the FIRST share of the weights, and of those after the last matrix."""
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    reached = list(accumulate(sum(sizes.get(name, 0) for name in node.input) for node in graph.node))
    matrices = [number for number, node in enumerate(graph.node) if node.op_type in ("Gemm", "MatMul")]
    return [
        node.name
        for number, node in enumerate(graph.node)
        if reached[number] <= FIRST * sum(sizes.values()) or number > matrices[-1]
    ]
