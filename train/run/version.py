"""Which code a run was trained by."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def code_version() -> str:
    """The commit of this checkout, -dirty where files differ from it; where there is none, a hash of the sources."""
    if (ROOT / ".git").exists():  # else git would look for one further up
        # A checkout that is mounted into a container belongs to somebody whom git would not trust.
        options = ["-c", f"safe.directory={ROOT}", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            found = subprocess.run(["git", *options], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
            return found.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    digest = hashlib.sha256()
    for package in ("data_pipeline", "train"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(path.read_bytes())
    return f"sources-{digest.hexdigest()[:16]}"
