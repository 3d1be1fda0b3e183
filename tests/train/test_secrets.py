"""A run over signed urls, with keys in its environment: none of them is in what it keeps or says."""

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.storage.manifest import load_manifest, write_manifest
from tests.support.running import prepare, run_dir
from tests.support.server import serve
from tests.support.small import write_data
from train import checkpoint, cli, loop
from train.__main__ import main
from train.config import RunConfig

pytestmark = pytest.mark.usefixtures("runs_in_this_process")
PASSWORD, SIGNATURE, KEY = "hunter2hunter2", "5f2c77aa90e1", "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"
SECRETS = [secret.encode() for secret in (PASSWORD, SIGNATURE, KEY)]


@pytest.fixture
def signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RunConfig]:
    """A run whose manifest and shards are at urls with a password and a signature; some samples are bad."""
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, KEY)
    (tmp_path / "remote").mkdir()
    with serve(tmp_path / "remote") as server:
        write_data(server.directory / "a", (20,), bad=(3, 8, 13))
        write_data(
            server.directory / "b", (20,), bad=(5, 10, 15)
        )  # of the same name: the ledger tells them apart by address
        base, query = server.url.replace("://", f"://me:{PASSWORD}@"), f"?X-Amz-Signature={SIGNATURE}"
        shards = [
            replace(shard, url=f"{base}/{name}/{Path(shard.url).name}{query}")
            for name in "ab"
            for shard in load_manifest(server.directory / name).shards
        ]
        write_manifest(server.directory / "manifest.json", shards, {})
        config = prepare(tmp_path, steps=3, global_batch=16, micro_batch=8)
        config.data.train, config.data.val = f"{base}/manifest.json{query}", f"{base}/manifest.json{query}"
        config.data.cache_dir, config.data.image_size = str(tmp_path / "cache"), 32
        config.data.max_bad_fraction = 1.0
        config.model.image.name = "shufflenet_v2_x0_5"
        yield config


def leaks(directory: Path) -> list[str]:
    """Files below a directory that hold a secret."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(secret in path.read_bytes() for secret in SECRETS)]


def test_case_17_no_secret_is_kept_or_said_and_files_have_the_rights_of_the_umask(signed, tmp_path, capfd) -> None:
    before = os.umask(0o027)
    try:
        assert loop.run(signed) == 0
    finally:
        os.umask(before)
    directory = run_dir(signed)
    ledger = [json.loads(line) for line in (directory / "ledger.jsonl").read_text().splitlines()]
    assert {record["shard"].split("/")[-2] for record in ledger} == {"a", "b"}
    assert (directory / "report").is_dir() and checkpoint.newest(directory) is not None
    assert leaks(directory) == []
    everything = [directory, *directory.rglob("*")]
    wide = {str(path): oct(path.stat().st_mode) for path in everything if path.stat().st_mode & 0o027}
    assert not wide
    printed = capfd.readouterr()
    assert not any(secret.decode() in printed.out + printed.err for secret in SECRETS)
    # What the run has kept names the data without what opens them: that is said, and not tried.
    kept = cli.load(directory / "config.yaml")
    assert kept.data.train.startswith("http://***@") and kept.data.train.endswith("?***")
    with pytest.raises(ValueError, match="its password or signature is not kept with a run; give the whole address"):
        load_manifest(kept.data.train)


@pytest.mark.slow
def test_case_17_no_secret_is_said_where_data_fail(signed, tmp_path, capfd) -> None:
    signed.data.val = ""
    (tmp_path / "remote" / "b" / "part-000000.tar").unlink()
    path = tmp_path / "config.yaml"
    for workers in (0, 1):
        signed.name, signed.data.workers = f"workers{workers}", workers
        # As a command line, which has the whole address.
        arguments = ["--config", str(path), "--data.train", signed.data.train]
        path.write_text(cli.to_yaml(signed))
        assert main(arguments) == 2
        printed = capfd.readouterr()
        assert "b/part-000000.tar" in printed.err and "could not be fetched" in printed.err
        assert not any(secret.decode() in printed.out + printed.err for secret in SECRETS)
        assert leaks(run_dir(signed)) == []
