"""The names of the package: all there, found when they are used, and none of them loads torch before that."""

import subprocess
import sys

import pytest

import data_pipeline
from data_pipeline.loader import train_loader

LIGHT = """
import sys
import data_pipeline
assert "train_loader" in dir(data_pipeline) and not hasattr(data_pipeline, "no_such_name")
from data_pipeline import BadSample, DataConfig, build_order, check_batch, load_manifest, normalization
check_batch(32, 8, 2)
heavy = {"torch", "transformers", "webdataset"} & set(sys.modules)
assert not heavy, heavy
"""


def test_importing_the_package_loads_no_torch() -> None:
    subprocess.run([sys.executable, "-c", LIGHT], check=True, timeout=60)


def test_every_name_is_found() -> None:
    for name in data_pipeline.__all__:
        assert getattr(data_pipeline, name).__name__ == name
    assert data_pipeline.train_loader is train_loader
    with pytest.raises(ImportError, match="no_such_name"):
        from data_pipeline import no_such_name  # noqa: F401
