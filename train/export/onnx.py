"""Target `onnx`: both encoders for any ONNX runtime, in fp32 and in fp16, opset 18.

image.onnx, text.onnx              `images`, uint8 [B, 3, H, W]; or `ids` and `mask`, int64 [B, L]
image_fp16.onnx, text_fp16.onnx    -> `features`, float32 unit vectors [B, D]; B and L are free
tokenizer/, config.json            as in the target `torch`
preprocessing.py                   image files -> uint8 tensors; the normalization of pixels is in the model
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from train.export.apart import embed_apart
from train.export.files import write_inputs
from train.export.pairs import HALF_COSINE, HALF_TIE, Features
from train.export.programs import programs
from train.export.source import Source
from train.export.target import Target

OPSET = 18
INPUTS = {"image": ["images"], "text": ["ids", "mask"]}
# Sums of squares leave the range of fp16.
STAY_FP32 = ("ReduceL2", "ReduceMean", "LayerNormalization", "Pow")
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
        from onnxruntime.transformers import float16

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
            kept = [*float16.DEFAULT_OP_BLOCK_LIST, *STAY_FP32]
            half = float16.convert_float_to_float16(made.model_proto, keep_io_types=True, op_block_list=kept)
            onnx.save(half, directory / f"{name}_fp16.onnx")
        write_inputs(source, directory, opset=OPSET)

    def embed(self, source: Source, directory: Path, images: list[Path], captions: list[str]) -> dict[str, Features]:
        given = (sys.executable, directory, images, captions)
        single = embed_apart(EMBED.replace("SUFFIX", ""), *given)
        half = embed_apart(EMBED.replace("SUFFIX", "_fp16"), *given)
        return {"fp32": single, "fp16": half._replace(tie=HALF_TIE, least=HALF_COSINE)}
