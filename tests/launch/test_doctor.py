"""The doctor on real ranks, and its arithmetic against counts made by hand."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.config import Source
from data_pipeline.stages.handover import piece_bytes
from launch import host_checks, run_checks
from launch.doctor import main, worst_of_ranks
from launch.findings import Finding, fail, ok, table, warn, worst
from tests.support.server import serve
from tests.support.small import small_config, write_data
from tests.support.vocabulary import write_tokenizer
from train import curate, memory
from train.config import RunConfig
from train.engine.zero import BUCKET_ELEMENTS

ROOT = Path(__file__).parents[2]
SMALL = ["--model.image.name=resnet18", "--model.text.weights=scratch", "--data.image_size=64", "--data.max_tokens=16"]
SMALL += ["--train.global_batch=8", "--train.micro_batch=4"]
NOBODY = "http://127.0.0.1:1"
BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 64, "vocab_size": 100}


@pytest.fixture
def bert(tmp_path):
    """A directory with the architecture of a tiny text tower and a tokenizer."""
    directory = tmp_path / "bert"
    write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(BERT))
    return directory


def doctor(*arguments: object, processes: int) -> tuple[int, dict]:
    """The doctor on ranks of its own: exit status and report."""
    launcher = ["launch.start", "--config_file", "launch/accelerate/cpu.yaml", "--num_processes", str(processes)]
    launcher += ["--main_process_port", "0", "-m", "launch.doctor"]
    command = [sys.executable, "-m", *launcher, "--json", *SMALL, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_API_KEY": "x" * 40, "WANDB_BASE_URL": NOBODY}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert "{" in done.stdout, done.stdout + done.stderr
    return done.returncode, json.loads(done.stdout[done.stdout.index("{") :])


def finding(report: dict, name: str) -> dict:
    return next(found for found in report["findings"] if found["check"] == name)


def test_two_ranks_are_examined_together(tmp_path, bert):
    status, report = doctor(f"--model.text.name={bert}", f"--runs_dir={tmp_path}/runs", processes=2)
    assert status == 0, report
    assert report["status"] == "warn"
    assert "2 ranks: all-reduce" in finding(report, "collectives")["measured"]
    assert "between 2 ranks" in finding(report, "clock skew")["measured"]
    room = shutil.disk_usage(tmp_path).free >= 20e9
    assert finding(report, "runs directory")["status"] == ("ok" if room else "warn")
    assert list((tmp_path / "runs").iterdir()) == [], "it leaves nothing behind"
    assert "127.0.0.1:1 does not answer" in finding(report, "W&B")["measured"], "a key alone is not online"
    assert finding(report, "pretrained weights")["status"] == "ok"
    assert "x" * 40 not in json.dumps(report)


def test_what_fails_has_a_remedy_and_an_exit_status(tmp_path, bert, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    wrong = ("--data.train=/nowhere", "--data.val=/nor/here", "--train.global_batch=6", "--tracking.wandb=offline")
    weights = "--model.image.weights=gone.pth"
    assert main(["--json", *SMALL, f"--model.text.name={bert}", f"--runs_dir={blocked}/runs", weights, *wrong]) == 1
    report = json.loads(capsys.readouterr().out)
    for name, words in (
        ("runs directory", "--runs_dir"),
        ("data", "/nowhere"),
        ("held-out data", "/nor/here"),
        ("pretrained weights", "--model.image.weights gone.pth: no such file"),
        ("memory plan", "--train.global_batch 6"),
    ):
        found = finding(report, name)
        assert found["status"] == "fail"
        assert words in found["measured"] + found["remedy"]
        assert found["remedy"]
    assert finding(report, "W&B")["measured"] == "offline, as asked"


def test_without_a_run_nothing_is_fetched():
    assert [found.status for found in (*run_checks.weights(RunConfig()), *run_checks.data(RunConfig()))] == [
        "warn",
        "warn",
    ]


def test_worst_and_table():
    findings = [ok("a", "1"), warn("long name", "2", "do this"), ok("c", "3")]
    assert worst(findings) == "warn"
    assert worst([*findings, fail("d", "4", "do that")]) == "fail"
    assert worst([]) == "ok"
    lines = table(findings).splitlines()
    assert lines[0] == "ok    a          1"
    assert lines[2].strip() == "-> do this"
    assert lines[-1] == "2 ok, 1 warn, 0 fail"
    assert Finding("a", "ok", "1") == ok("a", "1")


def test_state_bytes_of_every_zero_stage():
    plan = memory.Plan(parameters=1000, learning=1000, activations=0, loss=0, world=4, ema=False)
    bucket = 4 * BUCKET_ELEMENTS
    assert [plan.state(stage) for stage in range(4)] == [16_000, 11_000 + bucket, 8_000 + bucket, 4_000 + bucket]
    half_locked = replace(plan, learning=500, ema=True)
    assert [half_locked.state(stage) for stage in (0, 2)] == [12_000, 4_000 + 500 * (4 + 1 + 2 + 1) + bucket]


@pytest.mark.parametrize("tower", ["alexnet", "resnet18"])
def test_a_tower_without_blocks_is_not_to_compute_them_again(tmp_path, tower):
    config = small_config(tmp_path)
    config.data.image_size = 64
    image, text = replace(config.model.image, name=tower), replace(config.model.text, checkpointing=True)
    config = replace(config, model=replace(config.model, image=image, text=text))
    said = memory.less_memory(memory.plan(config, 1, bf16=False), config)
    assert ("--model.image.checkpointing true" in said) == (tower == "resnet18")
    assert "--model.text.checkpointing" not in said, "it is on already"


def test_gradients_of_one_part_come_as_its_activations_go():
    one = memory.Plan(parameters=10**9, learning=10**9, activations=8 * 10**9, loss=0, world=1, ema=False)
    state, working = memory.RESERVE * 12e9, memory.WORKING * 8e9
    assert one.total(0) == pytest.approx(state + working + memory.LIBRARIES)
    both = state + memory.RESERVE * 4e9 + working + memory.LIBRARIES
    assert replace(one, parts=2).total(0) == replace(one, world=2).total(0) == pytest.approx(both)
    assert replace(one, activations=0).total(0) == pytest.approx(memory.RESERVE * 16e9 + memory.LIBRARIES)
    assert "each of 1 rank(s): 22.7 GB under DDP" in one.in_words()
    assert "beside it rank 0's host 12.0 GB, to write checkpoints" in one.in_words()


def small(bert: Path, global_batch: int) -> RunConfig:
    config = RunConfig()
    config.model.image.name, config.model.text.name, config.model.text.weights = "resnet18", str(bert), "scratch"
    config.data.image_size, config.data.max_tokens = 64, 16
    config.train.global_batch, config.train.micro_batch = global_batch, 8
    return config


def test_activations_grow_with_the_resident_micro_batches(bert, monkeypatch):
    config = small(bert, 64)
    one = memory.plan(config, world=2, bf16=False)
    config.train.resident = 4
    four = memory.plan(config, world=2, bf16=False)
    enough = four.total(0) / memory.FILL
    assert one.most_resident(enough, 0) == one.share == 4
    assert one.most_resident(enough - 1, 0) == 3 and one.most_resident(0, 0) == 1
    config.train.resident, config.train.global_batch = None, 32
    needs = memory.plan(config, world=1, bf16=False)
    for bytes_there, kept in ((0, 1), (1e12, 4)):
        monkeypatch.setattr(memory, "own_memory", lambda there=bytes_there: there)
        assert memory.resident(needs, 0) == kept
    assert 3.5 < four.activations / one.activations < 4.5
    config.train.resident, config.train.global_batch = 4, 64
    config.model.image.checkpointing = config.model.text.checkpointing = True
    assert memory.plan(config, world=2, bf16=False).activations < 0.6 * four.activations
    with pytest.raises(ValueError, match=r"global_batch 64 .* 3 processes x micro_batch 8"):
        memory.plan(config, world=3, bf16=False)


def test_a_tower_that_never_learns_needs_its_weights_alone(bert):
    config = small(bert, 8)
    every = memory.plan(config, world=1, bf16=False)
    assert every.learning == every.parameters
    config.model.image.locked_until = -1
    locked = memory.plan(config, world=1, bf16=False)
    assert locked.parameters == every.parameters and locked.learning < every.learning - 11e6


@pytest.mark.parametrize(("broken", "status"), [((), "ok"), ((7,), "ok"), (tuple(range(30)), "warn")])
def test_bad_samples_are_counted(tmp_path, broken, status):
    config = RunConfig()
    config.data.train, config.data.image_size = str(write_data(tmp_path / "data", (110,), bad=broken)), 32
    with pytest.raises(ValueError, match="the 110 samples of source 0 are fewer than the 1024 rows"):
        run_checks.data(config)
    config.train.global_batch = 64
    (found,) = run_checks.data(config)
    assert found.status == status
    assert (f"{len(broken)} of 110 tried are bad, such as " in found.measured) == bool(broken)


def test_what_drops_held_out_images_from_the_training_data_is_a_command(tmp_path):
    config = RunConfig()
    config.data.train = config.data.val = str(write_data(tmp_path / "data", (8,)))
    (found,) = run_checks.held_out(config)
    assert found.status == "warn" and "8 of the 8 images of val are training images, too" in found.measured
    command = found.remedy.removeprefix("python -m train.curate ").removesuffix(" leaves them out")
    options = curate.make_parser().parse_args(command.split())
    assert options.held_out and options.out


def test_every_source_is_read_and_remote_shards_stay_in_the_cache(tmp_path, monkeypatch):
    shards, config = write_data(tmp_path / "data", (3, 3)), RunConfig()
    config.data.image_size, config.data.cache_dir = 32, str(tmp_path / "cache")
    config.data.lanes, config.train.global_batch = 1, 2
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with serve(shards) as server:
        config.data.train = [Source(str(shards), 1.0), Source(f"{server.url}/manifest.json", 1.0)]
        found, cache = run_checks.data(config)
    assert found.status == "ok" and "12 samples in 4 shards" in found.measured and "MB/s" in found.measured
    assert cache.status == "ok" and str(tmp_path / "cache") in cache.measured
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config.data.cache_dir = ""
    with serve(shards) as server:
        config.data.train = f"{server.url}/manifest.json"
        run_checks.data(config)
    assert list((tmp_path / "home/.cache/duet").glob("*.tar")) and not list((tmp_path / "here").iterdir())
    config.data.train = [Source(str(shards), 1.0), Source("/nowhere", 1.0)]
    with pytest.raises(ValueError, match="/nowhere"):
        run_checks.data(config)


def test_a_stream_needs_no_manifest(tmp_path):
    config = RunConfig()
    config.data.mode, config.data.train = "stream", f"{write_data(tmp_path / 'data', (2, 2))}/*.tar"
    config.train.steps = 1
    (found,) = run_checks.data(config)
    assert found.status == "ok" and "2 shards, read as a stream" in found.measured
    with serve(tmp_path / "data") as server:
        config.data.train = f"{server.url}/gone-{{0..1}}.tar"
        (found,) = run_checks.data(config)
    assert found.status == "fail" and "gone-0.tar is not there" in found.measured


def test_the_key_that_wandb_login_writes_is_found(tmp_path, monkeypatch):
    """Its server's name depends on the version of wandb: it is asked, not assumed."""
    (tmp_path / "index.html").write_text("here")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with serve(tmp_path) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        (found,) = run_checks.wandb(RunConfig())
        assert found.status == "warn" and "wandb login" in found.remedy
        host = server.url.removeprefix("http://")
        (tmp_path / "netrc").write_text(f"machine {host}\n login user\n password {'0' * 40}\n")
        (found,) = run_checks.wandb(RunConfig())
    assert found.status == "ok" and server.url in found.measured
    monkeypatch.setenv("WANDB_MODE", "dryrun")
    assert run_checks.wandb(RunConfig())[0].measured == "offline, as asked"


def test_what_one_rank_alone_finds_names_its_host():
    here, there = [ok("data", "seen"), ok("free", "1")], [fail("data", "no such file", "mount it"), ok("free", "2")]
    data, free = worst_of_ranks([("node0", here), ("node1", there), ("node1", there)])
    assert data == fail("data", "rank 1 on node1 and 1 more: no such file", "mount it")
    assert free == ok("free", "1")
    assert worst_of_ranks([("node0", there), ("node1", there)]) == there, "all ranks: no host to name"
    assert worst_of_ranks([("node0", here), ("node1", here[:1])]) == here, "one broke off"


def test_the_tiled_loss_needs_a_small_part_of_the_full_one():
    config = RunConfig()
    config.train.global_batch = 32_768
    config.loss.rows = "full"
    numbers = {"image": 512, "text": 512}
    full = memory.loss_bytes(config, world=1, numbers=numbers)
    assert full == 4 * 32_768 * 512 * 4 + 3 * 32_768**2 * 4
    config.loss.rows = "tiled"
    assert memory.loss_bytes(config, world=1, numbers=numbers) < full / 20
    # Of the images a rank has its own rows.
    saved = memory.loss_bytes(config, world=1, numbers=numbers) - memory.loss_bytes(config, world=8, numbers=numbers)
    assert saved == 2 * 4 * 512 * (32_768 - 4096)


def test_gpu_and_driver_are_reported_here():
    found = host_checks.devices()[0]
    assert found.status == ("ok" if torch.cuda.is_available() else "warn")


def test_shared_memory_holds_all_that_the_loaders_prepare(monkeypatch):
    config = RunConfig()
    config.train.global_batch, config.train.micro_batch, config.data.workers = 32_768, 64, 8
    piece = piece_bytes(64 * 3 * 224 * 224)
    # 64 micro-batches per rank and step: two steps' are more than what 8 workers prepare with the least prefetch.
    # Eight more are being made, and 64 are in use.
    assert memory.loader_bytes(config, world=8, local=8) == 8 * (2 * 64 + 8 + 64) * piece
    config.train.global_batch, config.train.micro_batch = 512, 64
    assert memory.loader_bytes(config, world=8, local=4) == 4 * (8 * config.data.prefetch + 8 + 1) * piece
    config.data.workers = 0
    assert memory.loader_bytes(config, world=8, local=8) == 0
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    config.data.workers, config.data.prefetch = 64, 400
    found = host_checks.host(config)[-1]
    assert found.status == "warn" and "loaders of 64 rank(s)" in found.measured and "--shm-size" in found.remedy
