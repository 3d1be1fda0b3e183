"""Fetching from a hub on this host: what is taken, asked, resumed, checked and found again without a network."""

import io
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import save_file

from data_pipeline.storage import hub as room
from data_pipeline.storage.download import download
from data_pipeline.storage.hub import TEXTS, WEIGHTS, fetch
from tests.support.hub import Hub, serve


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    repository = tmp_path / "served" / "someone" / "pair"
    repository.mkdir(parents=True)
    (repository / "config.json").write_text('{"model_type": "clip"}')
    (repository / "pytorch_model.bin").write_bytes(b"other weights")
    (repository / "flax_model.msgpack").write_bytes(b"not wanted")
    save_file({"a": torch.arange(100_000)}, repository / "model.safetensors")
    with serve(tmp_path / "served") as served:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        # As HF_ENDPOINT, which is read when the client is imported, would have it.
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = f"{served.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(room, "_answers", [])
        yield served


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_is_needed_is_fetched_once_and_found_without_the_hub(hub: Hub) -> None:
    directory = fetch("someone/pair", TEXTS, WEIGHTS)
    assert names(directory) == ["config.json", "model.safetensors"]
    served = hub.directory / "someone" / "pair" / "model.safetensors"
    assert (directory / "model.safetensors").read_bytes() == served.read_bytes()
    count = len(hub.got)
    assert fetch("someone/pair", TEXTS, WEIGHTS) == directory and len(hub.got) == count
    hub.shutdown()
    found = hf_hub_download("someone/pair", "model.safetensors", local_files_only=True)
    assert Path(found).parent == directory


def test_a_fetch_that_was_cut_off_resumes(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # what it writes at a time
    hub.cut = [300_000]
    directory = fetch("someone/pair", ["model.safetensors"])
    assert [start > 0 for _, start in hub.got] == [False, True]
    served = hub.directory / "someone" / "pair" / "model.safetensors"
    assert (directory / "model.safetensors").read_bytes() == served.read_bytes()


def test_a_file_without_its_hash_is_removed(hub: Hub) -> None:
    hub.wrong = True
    with pytest.raises(ValueError, match=r"model\.safetensors of someone/pair did not have its sha256 and was removed"):
        fetch("someone/pair", ["model.safetensors"])
    hub.wrong = False
    assert names(fetch("someone/pair", ["model.safetensors"])) == ["model.safetensors"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("said", "ranks", "asked"), [("y\n", 1, True), ("n\n", 1, True), ("", 2, False)])
def test_a_terminal_is_asked_once_and_several_processes_never(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, said: str, ranks: int, asked: bool
) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stdin", Terminal(said))
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    if said == "n\n":
        with pytest.raises(ValueError, match="it was not to be fetched"):
            fetch("someone/pair", TEXTS, WEIGHTS)
        assert not hub.got
    else:
        fetch("someone/pair", TEXTS)
        fetch("someone/pair", TEXTS, WEIGHTS)
    question = "someone/pair is to be fetched from the Hugging Face hub"
    assert screen.getvalue().count(question) == int(asked)


def test_a_file_at_a_url_is_resumed_and_checked(hub: Hub, tmp_path: Path) -> None:
    import hashlib

    url = f"{hub.url}/someone/pair/resolve/main/model.safetensors"
    data = (hub.directory / "someone" / "pair" / "model.safetensors").read_bytes()
    path = tmp_path / "weights" / "model.safetensors"
    hub.cut = [300_000]
    with pytest.raises(OSError, match=r"cut after 300,000 of 800,"):
        download(url, path)
    assert not path.exists()
    download(url, path, hashlib.sha256(data).hexdigest()[:8])
    assert path.read_bytes() == data and hub.got == [("model.safetensors", 0), ("model.safetensors", 300_000)]
    download(url, path)
    assert len(hub.got) == 2 and names(path.parent) == ["model.safetensors"]
    with pytest.raises(ValueError, match="does not have the sha256 abcd and was removed"):
        download(url, tmp_path / "other", "abcd")
    assert not (tmp_path / "other").exists()
