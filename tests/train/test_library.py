"""Duet as a library: names that are imported lazily, and programs that use them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from tests.support.pictures import rich_picture
from tests.support.small import write_data
from tests.support.vocabulary import write_tokenizer

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


def test_a_trainer_of_ones_own_makes_the_same_losses_on_one_process_and_two(tmp_path):
    """The program of train/examples as its docstring starts it, on the gradient of the whole global batch."""
    data = write_data(tmp_path / "data", (40, 30), draw=rich_picture)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    program = ["-m", "train.examples.own_trainer", str(data), str(tokenizer)]
    alone = losses_of([sys.executable, *program])
    together = losses_of(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *program]
    )
    assert len(alone) == 10
    assert alone[-1] < alone[0]
    assert together == pytest.approx(alone, rel=1e-5)


def losses_of(command: list[str]) -> list[float]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return [float(line.split()[-1]) for line in result.stdout.splitlines() if line.startswith("step")]
