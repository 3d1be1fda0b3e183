"""The run as a user starts it: killed, stopped, resumed, refused."""

import contextlib
import io
import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from data_pipeline.order import build_order
from data_pipeline.storage.manifest import load_manifest
from tests.support import running
from tests.support.distributed import run_distributed
from tests.support.running import BATCH, MICRO_BATCH, STEPS, assert_same_curve, curve, prepare, run, run_dir
from tests.support.small import write_data
from train import checkpoint, cli, loop
from train.__main__ import main
from train.config import RunConfig
from train.run.records import METRICS, read_records
from train.run.signals import EXIT_PREEMPTED, SIGNALS

pytestmark = pytest.mark.usefixtures("runs_in_this_process")


TOLERANCE = 2e-5
"""By which the losses of another engine or world may differ over eight steps; they differ by 5e-6."""


def slow_learner(directory: Path) -> RunConfig:
    """A run whose losses can be compared over engines: the rounding of another order of sums grows with the learning
    rate, at 3e-5 to 1.3e-4 of the loss in the seventh step."""
    config = prepare(directory)
    config.optim.lr = 1e-5
    return config


@pytest.fixture(scope="module")
def straight(runs_in_this_process, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of one process that nothing disturbed."""
    config = slow_learner(tmp_path_factory.mktemp("straight"))
    assert loop.run(config) == 0
    return config


def weights(config: RunConfig) -> bytes:
    return (run_dir(config) / "checkpoints" / f"step_{STEPS:08d}" / "model.safetensors").read_bytes()


def test_case_01_killed_again_and_again_it_ends_in_the_same_bytes(straight, tmp_path: Path) -> None:
    config = slow_learner(tmp_path)
    for step in (1, 7):  # before the first checkpoint, after the second
        process = running.start(running.command(config, tmp_path), tmp_path / "killed.log")
        running.wait_for_step(config, step, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert loop.run(config) == 0
    assert [step for step, _, _ in curve(config)] == list(range(1, STEPS + 1))
    assert curve(config) == curve(straight)
    assert weights(config) == weights(straight)
    results = [json.loads((run_dir(c) / "results.json").read_text()) for c in (config, straight)]
    assert results[0]["val"] == results[1]["val"]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "processes"), [("ddp", 2), ("zero2", 2)])
def test_more_processes_make_the_same_curve(straight, tmp_path: Path, engine: str, processes: int) -> None:
    config = slow_learner(tmp_path)
    run(config, tmp_path, engine=engine, processes=processes)
    assert_same_curve(curve(config), curve(straight), TOLERANCE)


def test_two_processes_of_one_micro_batch_each_end_in_the_same_bytes_as_one(tmp_path: Path) -> None:
    """At a learning rate that makes a difference in any last digit grow a thousandfold."""
    config = prepare(tmp_path, micro_batch=BATCH // 2)
    config.optim.lr, config.data.val = 1e-3, ""
    config.loss.mask_duplicates, config.train.resident = True, 2
    one, two = (replace(config, name=name) for name in ("one", "two"))
    assert loop.run(one) == 0
    run(two, tmp_path, engine="ddp", processes=2)
    assert weights(two) == weights(one)
    assert_same_curve(curve(two), curve(one), 1e-15)


def test_case_03_a_signal_saves_and_another_engine_goes_on_with_the_same_curve(straight, tmp_path: Path) -> None:
    config = slow_learner(tmp_path)
    config.checkpoint.every = 100
    process = running.start(running.command(config, tmp_path, engine="ddp", processes=2), tmp_path / "stopped.log")
    running.wait_for_step(config, 2, process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == EXIT_PREEMPTED
    stopped = [path.name for path in (run_dir(config) / "checkpoints").glob("step_*")]
    assert len(stopped) == 1 and 2 <= int(stopped[0][5:]) < STEPS
    said = run(config, tmp_path, engine="zero2", processes=2)
    assert "data.normalize imagenet: mean 0.485/0.456/0.406, std 0.229/0.224/0.225" in said
    assert_same_curve(curve(config), curve(straight), TOLERANCE)


def test_a_finished_run_says_so_and_does_not_train(straight, capfd) -> None:
    config = straight
    before = (run_dir(config) / "metrics.jsonl").read_bytes()
    assert loop.run(config) == 0
    printed = capfd.readouterr().out
    assert "is finished already" in printed and "R@10" in printed
    assert (run_dir(config) / "metrics.jsonl").read_bytes() == before


def test_another_configuration_is_refused_with_the_difference(straight) -> None:
    config = cli.load(run_dir(straight) / "config.yaml")
    config.optim.lr, config.data.workers = 0.5, 3
    with pytest.raises(ValueError, match=r"(?s)^name small.*optim\.lr: 1e-05 -> 0\.5") as error:
        loop.run(config)
    assert "workers" not in str(error.value)


def test_case_06_a_damaged_checkpoint_is_passed_over(straight, tmp_path: Path, capfd) -> None:
    config = straight
    newest = checkpoint.newest(run_dir(config))
    assert newest.name == f"step_{STEPS:08d}" and (newest.parent / "latest").read_text().strip() == newest.name
    names = [str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()]
    assert {*checkpoint.FILES, "sha256.json", "text/config.json", "tokenizer/tokenizer.json"} < set(names)
    for name in names:
        content = bytearray((newest / name).read_bytes())
        damaged = content.copy()
        damaged[len(damaged) // 2] ^= 1
        (newest / name).write_bytes(damaged)
        assert checkpoint.newest(run_dir(config)).name == "step_00000006", name
        assert "is damaged" in capfd.readouterr().err
        (newest / name).write_bytes(content)
    assert checkpoint.newest(run_dir(config)) == newest


def test_a_run_in_a_thread_finishes_and_leaves_signals_alone(tmp_path: Path) -> None:
    config = prepare(tmp_path, steps=2)
    config.data.val = ""
    handlers = [signal.getsignal(getattr(signal, name)) for name in SIGNALS]
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(loop.run, config).result() == 0
    assert [step for step, _, _ in curve(config)] == [1, 2]
    assert [signal.getsignal(getattr(signal, name)) for name in SIGNALS] == handlers


def test_case_10_bad_samples_are_replaced_and_written_down_until_there_are_too_many(tmp_path: Path) -> None:
    config = prepare(tmp_path, steps=2)
    config.data.train = str(write_data(tmp_path / "bad", (64,), bad=(3, 17)))
    config.data.val = ""
    assert loop.run(config) == 0
    records = [json.loads(line) for line in (run_dir(config) / "ledger.jsonl").read_text().splitlines()]
    assert sorted(record["key"] for record in records) == ["0003", "0017"]  # one epoch: each of them once
    assert all(record["cause"] and record["shard"] and record["replaced_by"] for record in records)

    config = prepare(tmp_path, steps=4)
    config.name, config.data.val = "worse", ""
    config.data.train = str(write_data(tmp_path / "worse", (64,), bad=range(0, 64, 2)))
    with pytest.raises(
        ValueError, match=r"^data\.max_bad_fraction 0\.01: \d+ of \d+ samples were bad.*Raise it to resume"
    ):
        loop.run(config)
    config.data.max_bad_fraction = 1.0
    assert loop.run(config) == 0


def test_an_overlap_that_cannot_be_looked_for_is_said_and_ends_nothing(tmp_path: Path, capfd) -> None:
    config = prepare(tmp_path, steps=1, global_batch=MICRO_BATCH)
    config.data.train = str(write_data(tmp_path / "long", (2 * BATCH, 2 * BATCH)))
    config.data.lanes, config.data.shuffle_shards = 1, 1
    manifest = load_manifest(config.data.train)
    order = build_order([manifest], [1.0], MICRO_BATCH, 1, config.train.seed, 1)
    (read,) = {position.shard for position in order.rows(0, 0, MICRO_BATCH)}
    Path(manifest.shards[1 - read].url).unlink()
    assert loop.run(config) == 0, "its only step needs the other shard alone"
    assert "warning: held-out images were not looked for among the training images" in capfd.readouterr().out


def test_case_15_too_many_steps_in_a_row_without_a_finite_gradient_end_the_run(tmp_path: Path) -> None:
    config = prepare(tmp_path, max_skipped=2)
    config.data.val, config.data.image_size, config.checkpoint.every = "", 32, 1
    config.optim.lr, config.optim.warmup_steps = 1e30, 0  # sums of squares overflow from the second step on
    config.tracking.diagnostics_every = 1
    with pytest.raises(ValueError, match=r"train\.max_skipped 2: no finite gradient in the last 3 steps"):
        loop.run(config)
    saved = checkpoint.newest(run_dir(config))
    state = checkpoint.load_state(saved)
    assert (state.step, state.updates, state.skipped, state.skipped_in_row) == (3, 1, 2, 2)
    measured = [record["step"] for record in read_records(run_dir(config) / METRICS) if "update_ratio/text" in record]
    assert measured == [1], "a step that was skipped made no update"
    weights = load_file(saved / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())
    config.checkpoint.every = 0
    with pytest.raises(ValueError, match="in the last 3 steps"):  # the count resumes where it was saved
        loop.run(config)
    assert [entry[0] for entry in curve(config)] == [1, 2, 3]
    config.train.max_skipped = 3  # the limit may be raised for the same run
    with pytest.raises(ValueError, match="in the last 4 steps"):
        loop.run(config)


def test_stream_mode_trains_without_a_manifest(tmp_path: Path) -> None:
    config = prepare(tmp_path, steps=2)
    config.data.mode, config.data.train = "stream", str(tmp_path / "train" / "*.tar")
    config.data.val = ""
    assert loop.run(config) == 0
    assert [step for step, _, _ in curve(config)] == [1, 2]
    config.name, config.train.steps = "endless", 0
    with pytest.raises(ValueError, match=r"so give train\.steps"):
        loop.run(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch": 18}, r"^global_batch 18 is not divisible by micro_batch 8: .* such as 16"),
        ({"global_batch": 400}, r"lower `global_batch`"),
    ],
)
def test_a_batch_that_cannot_be_dealt_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loop.run(prepare(tmp_path, **change))


def test_a_synchronized_norm_needs_the_whole_share_at_once(tmp_path: Path) -> None:
    config = prepare(tmp_path)
    config.model.image.norm = "sync_batch"
    with pytest.raises(ValueError, match=r"train\.resident 1: .* sync_batch .* set train\.resident 4"):
        loop.run(config)


def test_processes_that_cannot_share_a_batch_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(cli.to_yaml(prepare(tmp_path, global_batch=28)))
    for status, printed in run_distributed(main_of_a_rank, 2, str(path)):
        assert status == 2
        assert (
            "--train.global_batch 28 is not divisible by 2 processes x micro_batch 8: give a multiple of 16" in printed
        )


def main_of_a_rank(path: str) -> tuple[int, str]:
    """Exit status and messages of `python -m train`."""
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        status = main(["--config", path])
    return status, printed.getvalue()


def test_a_run_that_only_rank_0_sees_finished_is_finished_for_all(straight, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(cli.to_yaml(straight))
    assert run_distributed(status_of_a_rank, 2, str(path), str(tmp_path), timeout=60) == [0, 0]


def status_of_a_rank(path: str, elsewhere: str) -> int:
    """Exit status of the run, which rank 1 looks for in a directory of its own."""
    config = cli.load(path)
    if os.environ["RANK"] == "1":
        config.runs_dir = elsewhere
    return loop.run(config)


def test_a_mistake_on_the_command_line_is_one_line(capfd) -> None:
    assert main(["--train.globalbatch", "16"]) == 2
    printed = capfd.readouterr().err
    assert "there is no field --train.globalbatch; did you mean --train.global_batch" in printed
    assert len(printed.splitlines()) == 1
