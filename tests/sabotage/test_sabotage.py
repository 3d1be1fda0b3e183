"""Each promise about faults, broken on purpose: a patch to the code, and the test that must turn red by it.

A patch begins with what it breaks and the tests that see it. To add one, break the code, save `git diff` with those two
lines before it, and put the code back.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATCHES = sorted(Path(__file__).parent.glob("*.patch"))
LEAST = 40


def red_tests(patch: Path) -> list[str]:
    """The tests that a patch names."""
    match = re.search(r"^Red: (.+)$", patch.read_text(), re.MULTILINE)
    assert match is not None, f"{patch.name} names no test"
    return match[1].split()


def pytest_in(directory: Path, *arguments: str, seconds: float = 900) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=seconds, check=False)


@pytest.mark.slow
def test_every_sabotage_fits_the_code_and_names_a_test_that_there_is() -> None:
    assert len(PATCHES) >= LEAST
    for patch in PATCHES:
        done = subprocess.run(["git", "apply", "--check", str(patch)], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{patch.name} does not fit any more: make it again\n{done.stderr}"
        for test in red_tests(patch):
            path, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}" in (ROOT / path).read_text(), f"{patch.name}: there is no {test}"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as it is, to be changed."""
    directory = tmp_path_factory.mktemp("sabotage") / "duet"
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)
    return directory


@pytest.mark.slow
@pytest.mark.timeout(3700)
def test_without_sabotage_they_are_green(copy: Path) -> None:
    tests = dict.fromkeys(test for patch in PATCHES for test in red_tests(patch))
    done = pytest_in(copy, *tests, seconds=3600)  # on a busy machine
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
def test_sabotage_turns_a_test_red(patch: Path, copy: Path) -> None:
    for arguments in ([], ["--reverse"]):
        done = subprocess.run(["git", "apply", *arguments, str(patch)], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if not arguments:
            tested = pytest_in(copy, *red_tests(patch))
    # 1: tests failed; else it could not be run at all.
    assert tested.returncode == 1, f"{patch.read_text().splitlines()[0]} Nobody sees it:\n{tested.stdout[-3000:]}"
