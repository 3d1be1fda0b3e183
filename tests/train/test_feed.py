"""A run whose data do not come: it says where they hang, keeps what it trained, and still hears a signal."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.loader import LoaderFailure
from data_pipeline.order import build_order
from data_pipeline.storage.manifest import load_manifest, write_manifest
from tests.support.running import curve, prepare, run_dir
from tests.support.server import Server, serve
from tests.support.small import write_data
from train import checkpoint, loop
from train.config import RunConfig
from train.run.signals import EXIT_PREEMPTED

pytestmark = pytest.mark.usefixtures("runs_in_this_process")
Stalled = tuple[RunConfig, Server]


@pytest.fixture
def stalled(tmp_path: Path) -> Iterator[Stalled]:
    """A run that reads two shards, one after the other; the second never comes.

    A micro-batch is handed over when the sample after it is there: of the first shard's four, three are.
    """
    (tmp_path / "remote").mkdir()
    with serve(tmp_path / "remote") as server:
        write_data(server.directory, (32, 32))
        shards = [replace(s, url=f"{server.url}/{Path(s.url).name}") for s in load_manifest(server.directory).shards]
        write_manifest(tmp_path / "manifest.json", shards, {})
        config = prepare(tmp_path, global_batch=16, steps=4)
        config.data.train, config.data.val = str(tmp_path / "manifest.json"), ""
        config.data.cache_dir, config.data.image_size = str(tmp_path / "cache"), 32
        config.data.lanes = config.data.shuffle_shards = config.data.workers = config.data.prefetch = 1
        server.faults = ["", "stall"]
        yield config, server


def resumed(config: RunConfig, server: Server) -> None:
    """The data are back: the run ends as if nothing had happened."""
    server.faults = []
    assert loop.run(config) == 0
    assert [step for step, _, _ in curve(config)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_case_13_a_loader_that_hangs_ends_the_run_with_what_it_trained_saved(stalled: Stalled, monkeypatch) -> None:
    config, server = stalled
    monkeypatch.setenv("DUET_TIMEOUT", "24")  # of which a busy machine may need most for the first batch
    where = (
        rf"has made nothing in \d\d s, at shard {server.url}/part-00000\d\.tar, sample \d+; its stacks are in (\S+)\."
    )
    with pytest.raises(LoaderFailure, match=where) as failure:
        loop.run(config)
    assert "It has 75% of DUET_TIMEOUT: raise that" in str(failure.value)
    stacks = run_dir(config) / "stacks" / "rank_00000_loader.txt"
    assert str(stacks) in str(failure.value) and "fetch" in stacks.read_text()
    assert checkpoint.steps(run_dir(config)) == [1]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 0])
def test_case_13_a_signal_while_a_loader_hangs_saves_and_ends(stalled: Stalled, workers: int) -> None:
    config, server = stalled
    config.data.workers = workers
    when_stalled(server, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert loop.run(config) == EXIT_PREEMPTED
    assert checkpoint.steps(run_dir(config)) == [1]
    assert not (run_dir(config) / "stacks").exists()
    resumed(config, server)


@pytest.mark.slow
def test_case_11_12_a_shard_that_is_missing_or_altered_ends_the_run_and_back_again_it_resumes(tmp_path: Path) -> None:
    config = prepare(tmp_path, global_batch=16, steps=4)
    config.data.train, config.data.val = str(write_data(tmp_path / "data", (32, 32))), ""
    config.data.lanes, config.data.shuffle_shards, config.data.image_size = 1, 1, 32
    config.model.image.name = "shufflenet_v2_x0_5"
    straight = replace(config, name="straight")
    assert loop.run(straight) == 0
    manifest = load_manifest(config.data.train)
    order = build_order([manifest], [1.0], 16, 1, config.train.seed, 1)
    (first,) = {position.shard for position in order.rows(0, 0, 16)}
    second = Path(manifest.shards[1 - first].url)
    away = second.rename(tmp_path / "away")
    with pytest.raises(ValueError, match=rf"{second.name} .*does not exist"):
        loop.run(config)
    assert checkpoint.steps(run_dir(config)) in ([1], [2]), "what was trained is saved"
    second.write_bytes(away.read_bytes().replace(b"heart", b"house"))
    with pytest.raises(ValueError, match=rf"{second.name} has [0-9a-f]{{64}} as its sha256, its manifest says"):
        loop.run(config)
    away.rename(second)
    assert loop.run(config) == 0
    assert curve(config) == curve(straight)


def when_stalled(server: Server, act: Callable[[], None]) -> None:
    """Act two seconds after the last fault has begun, when the steps before it are done."""

    def wait() -> None:
        while server.faults:
            threading.Event().wait(0.05)
        threading.Event().wait(2)
        act()

    threading.Thread(target=wait, daemon=True).start()
