"""The model card of an export, filled from the run: it says nothing that the run does not."""

from __future__ import annotations

import json

from train import cli
from train.export.files import padding
from train.export.source import Source
from train.run.directory import read_results

CARD = """---
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags: [image-text, contrastive, duet]
---

# {name}

A pair of encoders, {image} for images and {text} for texts, trained contrastively to embed both in one space of
{dim} dimensions. Written from {weights} of the run `{name}`.

```python
from PIL import Image
from transformers import AutoModel, AutoProcessor

model, processor = AutoModel.from_pretrained({directory}), AutoProcessor.from_pretrained({directory})
texts, image = ["a red flag", "a cat"], Image.open("photo.jpg")
inputs = processor(text=texts, images=image, padding="{padding}", return_tensors="pt")
print(model(**inputs).logits_per_image.softmax(-1))
```

{runtime}

## Data

`{data}` (identity `{identity}`). For its licences, see those of the data itself.

## Results

{results}

## Training

{seen:,} pairs seen in {steps} steps, in {precision}, by the code of {code}.

```yaml
{config}```
"""


OWN = """transformers has no class for {reason}: `modeling_duet.py` and `image_processing_duet.py`, beside
this card, are what `trust_remote_code=True` runs. They need torch, transformers and timm or torchvision, and prepare
images as the evaluation of the run did."""
STOCK = """All classes are transformers' own. Its image processor decodes a large JPEG file at full size and crops at
whole pixels, where the evaluation of the run decoded no more than it needed and cropped between pixels; and it
puts transparent parts over black. The embeddings of such images differ; those of `--to torch` and `onnx` do not."""


def model_card(source: Source, reason: str = "") -> str:
    """The card as Markdown; `reason`: the field of the recipe that asks for code of its own."""
    results, run = read_results(source.run), source.config
    measured = (results or {}).get("val") or {}
    return CARD.format(
        directory="DIRECTORY, trust_remote_code=True" if reason else "DIRECTORY",
        padding=padding(source),
        runtime=OWN.format(reason=reason) if reason else STOCK,
        name=run.name,
        image=run.model.image.name,
        text=run.model.text.name,
        dim=run.model.embed_dim,
        weights=_weights(source),
        data=f"`{json.dumps(run.data.train, default=vars)}`"
        if not isinstance(run.data.train, str)
        else f"`{run.data.train}`",
        identity=source.state.data_hash or "unknown",
        results=_table(measured, run.data.val) if measured else "None were measured.",
        seen=source.state.samples_seen,
        steps=source.state.step,
        precision={"bf16": "bf16 autocast", "no": "fp32"}.get(source.state.precision, "a precision that was not kept"),
        code=source.state.code or "an unknown version",
        config=cli.to_yaml(run),
    )


def _weights(source: Source) -> str:
    kind = "the moving average of the weights" if source.averaged else "the weights"
    steps = ", ".join(str(step) for step in source.steps)
    found = f"the mean of {kind} after steps {steps}" if len(source.steps) > 1 else f"{kind} after step {steps}"
    if source.tried:
        tried = ", ".join(str(one.step) for one in source.tried)
        best = max(one.score for one in source.tried if one.kept)
        found += f" (a greedy soup of steps {tried}, by mean recall on `{source.config.data.val}`: {best:.2f} %)"
    return found


def _table(metrics: dict[str, float], data: str) -> str:
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
    command = f"`python -m train.evaluate --run RUN --task retrieval --data {data}`"
    return f"Of the finished run on held-out data, by {command}:\n\n| metric | value |\n|---|---|\n{rows}"
