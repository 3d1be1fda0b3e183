"""A run under a random fault every half minute: nothing lost, nothing twice, memory flat."""

import itertools
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.faults.test_ranks import prepare, started
from tests.support import running
from tests.support.family import family, gone, loaders, ranks
from tests.support.running import curve, metrics, run_dir
from tests.support.small import write_data
from train import checkpoint
from train.config import RunConfig
from train.run.records import read_records
from train.run.signals import EXIT_PREEMPTED, SIGNALS
from train.run.tally import replaced_rows

MINUTES = float(os.environ.get("DUET_SOAK_MINUTES", 4))
COMPARED = 60
"""Steps that are compared with a run that nothing disturbed."""


def soaked(directory: Path) -> RunConfig:
    config = prepare(directory, workers=1)
    config.data.train = str(write_data(directory / "bad", (40, 30, 50), bad=(3, 50, 99)))
    config.data.max_bad_fraction, config.train.steps, config.checkpoint.every = 1.0, 100_000, 10
    return config


def damage_newest(config: RunConfig, rng: random.Random) -> None:
    """Flip a byte of the newest checkpoint, where there is another."""
    if len(checkpoint.steps(run_dir(config))) > 1:
        file = checkpoint.newest(run_dir(config)) / "optimizer.safetensors"
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1
        file.write_bytes(content)


def disturb(process, config: RunConfig, rng: random.Random) -> str:
    """One fault to a run of two ranks; its name."""
    found = list(ranks(process).values())
    if len(found) < 2:
        return "none"
    rank, kind = rng.choice(found), rng.choice(["kill", "kill all", "signal", "kill loader", "stop loader", "damage"])
    if kind == "signal":
        rank.send_signal(getattr(signal, rng.choice(SIGNALS)))
    elif "loader" in kind:
        for loader in loaders(rank):
            loader.send_signal(signal.SIGKILL if kind == "kill loader" else signal.SIGSTOP)
    elif kind == "kill":
        rank.kill()
    else:
        for one in family(process):
            if one.is_running():
                one.kill()
    return kind


@pytest.mark.slow
@pytest.mark.timeout(60 * MINUTES + 900)
def test_case_18_a_soak_under_random_faults(tmp_path, record_property, monkeypatch) -> None:
    monkeypatch.setenv("DUET_TIMEOUT", "40")
    rng, config = random.Random(18), soaked(tmp_path)
    alone = soaked(tmp_path / "alone")
    with started(alone, tmp_path / "alone", "ddp") as process:
        running.wait_for_step(alone, COMPARED, process, 600)
    end, faults, grown = time.monotonic() + 60 * MINUTES, [], []
    while time.monotonic() < end:
        with started(config, tmp_path, "ddp") as process:
            reached = max((record["step"] for record in metrics(config)), default=0)
            running.wait_for_step(config, reached + 3, process)
            before = memory(process)
            time.sleep(rng.uniform(20, 40))
            if after := memory(process):
                grown.append(after / before)
            faults.append(disturb(process, config, rng))
            code, everyone = process.wait(timeout=150), family(process)
            assert code != 0 and not gone(everyone, 10), (faults, (tmp_path / "run.log").read_text()[-3000:])
            if faults[-1] == "damage":
                damage_newest(config, rng)
    with started(config, tmp_path, "ddp") as process:
        running.wait_for_step(config, max(record["step"] for record in metrics(config)) + 3, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == EXIT_PREEMPTED
    state = checkpoint.load_state(checkpoint.newest(run_dir(config)))
    steps = [step for step, _, _ in curve(config)]
    assert steps == list(range(1, state.step + 1))
    shared = min(COMPARED, len(steps))
    assert curve(config)[:shared] == curve(alone)[:shared]
    sums = [sum(values) for values in zip(*state.samples.values(), strict=True)]
    listed = replaced_rows(read_records(run_dir(config) / "ledger.jsonl"))
    assert sums[0] == sums[1] + sums[2] == state.samples_seen and sums[2] == listed == state.bad_samples
    assert max(grown, default=1) < 1.05, list(itertools.chain(grown))
    record_property("tries", len(faults))


def memory(process) -> int:
    """Bytes that the ranks and their loaders have."""
    try:
        return sum(one.memory_info().rss for rank in ranks(process).values() for one in (rank, *loaders(rank)))
    except psutil.Error:
        return 0
