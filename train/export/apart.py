"""Runs an export where Duet is not, as whoever gets it will."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from safetensors.torch import load_file

from train.export.pairs import BATCH, Features

DISTRIBUTIONS = {"open_clip": "open_clip_torch"}
"""What pip calls a module, where that is another name."""
SCRIPT = """
import json, sys
import torch
from safetensors.torch import save_file

directory, inputs, outputs, batch = sys.argv[1:]
{script}
inputs, batch = json.load(open(inputs)), int(batch)
parts = {{}}
for name, encode in (("images", images), ("texts", texts)):
    given = inputs[name]
    with torch.no_grad():
        made = [encode(given[start : start + batch]) for start in range(0, len(given), batch)]
    parts[name] = torch.nn.functional.normalize(torch.cat(made).float(), dim=-1)
save_file(parts, outputs)
"""


def embed_apart(script: str, python: str, directory: Path, images: list[Path], captions: list[str]) -> Features:
    """Features that an export's own runtime makes of image files and captions, in a process of its own.

    Args:
        script: defines images(paths) and texts(captions), which return tensors, from the export in `directory`.
        python: the interpreter.

    Raises:
        ValueError: it fails, with the last line that it says, or lacks a module.
    """
    inputs, outputs = directory.with_suffix(".json"), directory.with_suffix(".safetensors")
    try:
        inputs.write_text(json.dumps({"images": [str(path.resolve()) for path in images], "texts": captions}))
        arguments = [str(directory.resolve()), str(inputs.resolve()), str(outputs.resolve()), str(BATCH)]
        command = [python, "-B", "-I", "-c", SCRIPT.format(script=script), *arguments]
        # Isolated (-I) from this directory and PYTHONPATH, where Duet may be.
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd="/",
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            if missing := re.search(r"No module named '(\w+)", said[-1]):
                package = DISTRIBUTIONS.get(missing[1], missing[1])
                remedy = f"install it there (pip install {package}), or give --python an interpreter that has it"
                raise ValueError(f"{python} has no {missing[1]}: {remedy}")
            raise ValueError(f"{python} cannot use what was written: {said[-1]}")
        found = load_file(outputs)
    except OSError as error:
        raise ValueError(f"python {python}: {error}") from error
    finally:
        inputs.unlink(missing_ok=True)
        outputs.unlink(missing_ok=True)
    return Features(found["images"], found["texts"])
