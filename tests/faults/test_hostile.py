"""Files of strangers: what is in them is never run, and nothing is written outside of where it belongs."""

import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from data_pipeline.storage.shards import ShardReader
from tests.support.bert import write_bert
from tests.support.checkpoints import save
from tests.support.small import small_config
from train import checkpoint
from train.checkpoint import FILES, Tensors, TrainState
from train.model.pair import build_model
from train.model.pretrained import read_state_dict


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Canary(path)))
    path.rmdir()  # it does sing
    return path


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("zipped", [True, False])
def test_case_17_weights_are_not_unpickled(suffix, zipped, canary, tmp_path) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save({"w": Canary(canary)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="cannot be read as a state dict"):
        read_state_dict(str(path))
    assert not canary.exists()


def test_case_17_a_text_tower_is_not_unpickled(canary, tmp_path) -> None:
    config = small_config(tmp_path)
    write_bert(tmp_path / "text", width=32, vocab_size=100, max_position_embeddings=40)
    for file in (tmp_path / "text").glob("*.safetensors"):
        file.unlink()
    torch.save({"w": Canary(canary)}, tmp_path / "text" / "pytorch_model.bin")
    config.model.text.weights = "pretrained"
    with pytest.raises(ValueError, match=r"model\.text"):
        build_model(config, (0.5,) * 3, (0.25,) * 3)
    assert not canary.exists()


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".safetensors")])
def test_case_17_a_checkpoint_is_not_unpickled(name, canary, tmp_path) -> None:
    weights = {"w": torch.zeros(3)}
    text = {"text/config.json": b"{}", "tokenizer/tokenizer_config.json": b"{}"}
    path = save(tmp_path, Tensors(weights, weights, weights), TrainState(), small_config(tmp_path), text)
    torch.save({"w": Canary(canary)}, path / name)
    hashes = json.loads((path / "sha256.json").read_text())
    hashes[name] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / "sha256.json").write_text(json.dumps(hashes))
    assert checkpoint.newest(tmp_path) == path
    with pytest.raises(SafetensorError):
        checkpoint.load_part(path, name.removesuffix(".safetensors"))
    assert not canary.exists()


def test_case_17_members_of_tars_are_never_written_anywhere(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    names = ["../out.txt", "/out.txt", "a/../../out.txt", "~/out.txt", "data/out.txt"]
    with tarfile.open(tmp_path / "data" / "a.tar", "w") as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name.replace("out", f"out{number}"))
            member.size, member.mode = 5, 0o4777
            tar.addfile(member, io.BytesIO(b"hello"))
    before = {str(path) for path in tmp_path.rglob("*")}
    reader = ShardReader(tmp_path / "data" / "a.tar")
    assert [reader.raw(number)["txt"] for number in range(len(reader))] == [b"hello"] * len(names)
    after = {str(path) for path in tmp_path.rglob("*")}
    assert after - before == {str(tmp_path / "data" / "a.tar.idx")}
    assert not any(Path(name).expanduser().exists() for name in ("/out1.txt", "~/out3.txt"))
    shutil.rmtree(tmp_path / "data")
