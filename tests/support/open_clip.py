"""An environment of its own for open_clip, below the cache directory."""

import os
import subprocess
import venv
from pathlib import Path

import torch

PACKAGES = ("open_clip_torch==3.3.0", "ftfy", "wcwidth")


def interpreter() -> str:
    """A python with open_clip, and all else from this one's packages; made where it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    directory = cache / "duet-tests" / "open_clip"
    found = directory / "bin" / "python"
    made = (directory / "complete").exists()
    if not made:
        venv.create(directory, with_pip=True, clear=True)
    (site,) = directory.glob("lib/python*/site-packages")
    # Every time: the packages with which it was made may be gone.
    (site / "shared.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    if not made:
        subprocess.run([found, "-m", "pip", "install", "-q", "--no-deps", *PACKAGES], check=True)
        (directory / "complete").touch()
    return str(found)
