"""Shards in S3, by moto's server: listed, indexed, fetched once, and refused where they are not what they were."""

import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipeline import loader
from data_pipeline.__main__ import main
from data_pipeline.order import build_order
from data_pipeline.storage.cache import Store
from data_pipeline.storage.manifest import Manifest, load_manifest
from data_pipeline.storage.remote import expand
from data_pipeline.tokenizer import Tokenizer
from tests.support.forwarding import forwarding
from tests.support.loading import BATCH, MICRO, SEED, settings
from tests.support.pictures import tiny_image
from tests.support.tars import write_shards
from tests.support.vocabulary import write_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BUCKET = "training-data"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client of an S3 that has two shards in a bucket."""
    for module in ("s3fs", "boto3", "moto.server"):
        pytest.importorskip(module)
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    try:
        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)

        def sample(number: int) -> tuple[str, dict[str, bytes]]:
            return f"{number:03d}", {"png": tiny_image(number), "txt": b"number %d" % number}

        for path in sorted(write_shards(tmp_path / "local", (BATCH, BATCH), sample).glob("*.tar")):
            client.upload_file(str(path), BUCKET, f"train/{path.name}")
        yield client
    finally:
        server.stop()


def store(directory: Path) -> Store:
    return Store(directory / "cache", 10**9, attempts=2, backoff=0.01)


def test_case_11_shards_in_s3_are_indexed_and_trained_on_and_faults_are_named(bucket, tmp_path, capsys) -> None:
    urls = [f"s3://{BUCKET}/train/train-{number:06d}.tar" for number in range(2)]
    assert expand([f"s3://{BUCKET}/train/"]) == expand([f"s3://{BUCKET}/train/*.tar"]) == urls
    assert main(["index", f"s3://{BUCKET}/train/", "--out", str(tmp_path / "manifest.json")]) == 0, capsys.readouterr()
    manifest = load_manifest(tmp_path / "manifest.json")
    assert [shard.url for shard in manifest.shards] == urls

    # Loader processes are forked after this process has talked to S3: each needs a connection of its own.
    tokenizer = Tokenizer(str(write_tokenizer(tmp_path / "tokenizer")), 24)
    order = build_order([manifest], [1.0], BATCH, 1, SEED, 1)
    config = settings(2)
    config.cache_dir = str(tmp_path / "cache")
    chosen = {"seed": SEED, "micro_batch": MICRO, "stop_step": 2}
    keys = [key for item in loader.train_loader(config, order, [manifest], tokenizer, **chosen) for key in item.keys]
    assert len(keys) == len(set(keys)) == 2 * BATCH
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2

    # Another object under the same name, of the same size.
    shard, elsewhere = manifest.shards[0], tmp_path / "elsewhere"
    whole = bucket.get_object(Bucket=BUCKET, Key="train/train-000000.tar")["Body"].read()
    for body, words in ((whole[:512] + b"!" + whole[513:], "the sha256 of what came is"), (whole[:-512], "bytes came")):
        bucket.put_object(Bucket=BUCKET, Key="train/train-000000.tar", Body=body)
        with pytest.raises(ValueError, match=rf"{urls[0]} could not be fetched in 2 tries: .*{words}"):
            store(elsewhere).local(shard)
    bucket.delete_object(Bucket=BUCKET, Key="train/train-000000.tar")
    with pytest.raises(ValueError, match=rf"{urls[0]} could not be fetched"):
        store(elsewhere).local(shard)
    assert not list((elsewhere / "cache").glob("*.part"))
    bucket.put_object(Bucket=BUCKET, Key="train/train-000000.tar", Body=whole)  # and back
    assert hashlib.sha256(Path(store(elsewhere).local(shard)).read_bytes()).hexdigest() == shard.sha256


def test_case_11_an_s3_without_keys_or_network_is_named(bucket, tmp_path, monkeypatch) -> None:
    main(["index", f"s3://{BUCKET}/train/", "--out", str(tmp_path / "manifest.json")])
    shard = replace(load_manifest(tmp_path / "manifest.json").shards[0], url="s3://another-bucket/a.tar")
    with pytest.raises(ValueError, match=r"s3://another-bucket/a\.tar could not be fetched"):
        store(tmp_path / "elsewhere").local(shard)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(ValueError, match=r"could not be fetched") as failure:
        store(tmp_path / "elsewhere").local(shard)
    assert "testing" not in str(failure.value)


def test_case_11_an_object_that_stalls_is_asked_for_again_where_it_stopped(bucket, tmp_path, monkeypatch) -> None:
    """As over http: the silence has a limit, and what comes after it is whole."""
    import s3fs

    shards = load(tmp_path).shards
    monkeypatch.setattr(s3fs.S3FileSystem, "read_timeout", 0.5)  # 15 s
    with forwarding(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2])) as between:
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        between.stalls = 2
        local = store(tmp_path / "elsewhere").local(shards[0])
        assert hashlib.sha256(Path(local).read_bytes()).hexdigest() == shards[0].sha256
        assert between.stalls == 0
        between.stalls = 1000
        began = time.monotonic()
        with pytest.raises(ValueError, match=rf"{shards[1].url} could not be fetched in 2 tries: .*imeout"):
            store(tmp_path / "elsewhere").local(shards[1])
        assert time.monotonic() - began < 2 * 5 * 0.5 + 30  # five times in each try, and pauses between them
        between.stalls = 0
        local = store(tmp_path / "elsewhere").local(shards[1])
        assert hashlib.sha256(Path(local).read_bytes()).hexdigest() == shards[1].sha256
    assert not list((tmp_path / "elsewhere" / "cache").glob("*.part"))


def test_case_11_an_s3_that_wants_keys_says_which(bucket, tmp_path, monkeypatch) -> None:
    shard = load(tmp_path).shards[0]
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_ENDPOINT_URL"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    remedy = "give keys by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    with pytest.raises(ValueError, match=remedy) as failure:
        store(tmp_path / "elsewhere").local(shard)
    assert "could not be fetched" in str(failure.value) and str(failure.value).count("\n") == 0
    with pytest.raises(ValueError, match=remedy):
        expand([f"s3://{BUCKET}/train/"])
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")  # and the remedy works
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    assert Path(store(tmp_path / "elsewhere").local(shard)).is_file()


def load(directory: Path) -> Manifest:
    """The manifest of what is in the bucket."""
    assert main(["index", f"s3://{BUCKET}/train/", "--out", str(directory / "manifest.json")]) == 0
    return load_manifest(directory / "manifest.json")
