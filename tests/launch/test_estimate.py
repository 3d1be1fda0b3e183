"""The estimate of the quickstart, from a trial."""

import json
import subprocess
import sys

import pytest

from launch.estimate import in_words, seconds_per_step
from tests.support.small import write_data

RATES = (1.0, 2.0, 4.0, 64.0, 32.0, 16.0)  # samples a second; the first three while things warm up


@pytest.fixture
def trial(tmp_path):
    records = [{"step": step, "samples_per_second": rate} for step, rate in enumerate(RATES, 1)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def test_the_first_steps_do_not_count(trial):
    assert seconds_per_step(trial, 64) == 2.0
    (trial / "metrics.jsonl").write_text('{"step": 1, "samples_per_second": 1.0}\n')
    with pytest.raises(ValueError, match="has 1 steps: a trial needs at least 4"):
        seconds_per_step(trial, 64)


@pytest.mark.parametrize(("seconds", "words"), [(40, "40 seconds"), (400, "6.7 minutes"), (40_000, "11.1 hours")])
def test_times_are_said_in_words(seconds, words):
    assert in_words(seconds) == words


@pytest.mark.parametrize(("length", "steps"), [(["--train.steps", "300"], 300), (["--train.epochs", "3"], 3)])
def test_the_whole_run_is_that_many_steps(trial, length, steps):
    data = write_data(trial / "data", [64])
    fields = ["--data.train", str(data), "--data.lanes", "1", "--train.global_batch", "64", *length]
    done = subprocess.run(
        [sys.executable, "-m", "launch.estimate", str(trial), *fields], capture_output=True, text=True
    )
    assert f"About {in_words(2.0 * steps)} of training: {steps} steps of 2.00 s" in done.stdout, done.stderr
