"""Duet as a library: names that are imported lazily, and programs that use them."""

import subprocess
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("package", ["train", "data_pipeline"])
def test_importing_a_package_loads_no_torch(package):
    code = f"import sys, {package}; print(sorted({{'torch', 'transformers', 'webdataset'}} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in train.__all__:
        assert callable(getattr(train, name)), name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'build_modell'"):
        _ = train.build_modell
