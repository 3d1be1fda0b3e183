"""Shards in Google Cloud Storage, by a server on this host that answers as it does; where gcsfs is installed."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.storage import remote
from data_pipeline.storage.cache import Store
from data_pipeline.storage.manifest import Shard
from tests.support.server import Server, serve
from tests.support.tars import describe, write_tar

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, Shard]]:
    """A storage that has a shard in a bucket, and that shard."""
    pytest.importorskip("gcsfs")
    path = write_tar(tmp_path / "a.tar", [("key.jpg", bytes(3000))])
    shard = replace(describe(path), url="gs://bucket/a.tar")
    about, content = (tmp_path / "storage" / f"{kind}storage/v1/b/bucket/o" for kind in ("", "download/"))
    for folder in (about, content):
        folder.mkdir(parents=True)
    (about / "a.tar").write_text(json.dumps({"name": "a.tar", "bucket": "bucket", "size": str(shard.filesize)}))
    (content / "a.tar").write_bytes(path.read_bytes())
    with serve(tmp_path / "storage") as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server, shard


def fetched(directory: Path, shard: Shard) -> str:
    """The sha256 of what is fetched."""
    path = Store(directory / "cache", 10**9, attempts=2, backoff=0.01).local(shard)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_case_11_a_bucket_that_wants_keys_is_one_line_that_says_which(storage, tmp_path, caplog) -> None:
    server, shard = storage
    server.faults = ["denied"] * 99
    with pytest.raises(ValueError, match=r"gs://bucket/a\.tar could not be fetched .*gcloud auth application-default"):
        fetched(tmp_path, shard)
    with pytest.raises(ValueError, match=r"could not be listed: .*GOOGLE_APPLICATION_CREDENTIALS"):
        remote.expand(["gs://bucket/"])
    assert not [record for record in caplog.records if record.name.startswith("gcsfs")]
    server.faults = []
    assert fetched(tmp_path, shard) == shard.sha256


def test_case_11_an_object_of_google_that_stalls_is_asked_for_again(storage, tmp_path, monkeypatch) -> None:
    server, shard = storage
    monkeypatch.setattr(remote, "SILENCE_SECONDS", 2)
    server.faults = ["stall"] * 3
    assert fetched(tmp_path, shard) == shard.sha256
    assert server.faults == []
