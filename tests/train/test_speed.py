"""Where the time of a step goes: the split, its place in the log, MFU and profiles, on real runs."""

import gzip
import json
import time
from itertools import pairwise

import pytest
import torch

from tests.support import training
from tests.support.running import metrics, run_dir
from tests.support.training import small_run
from train import timing
from train.checks import check
from train.model.flops import PairFlops
from train.model.pair import build_model
from train.run.profiler import dearest
from train.timing import PARTS, StepClock, exchange_from_end_of, section


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A run of three steps in two cached parts, the second of them profiled; its log, directory and configuration."""
    config = small_run(tmp_path_factory.mktemp("run"), steps=3)
    config.tracking.log_every, config.tracking.profile, config.tracking.peak_tflops = 1, "2:2", 1e-3
    config.data.image_size, config.train.global_batch, config.train.micro_batch = 32, 8, 4
    training.finish(config)
    return metrics(config), run_dir(config), config


def test_the_parts_of_a_step_add_up_to_it(seen):
    log, _, config = seen
    assert not any(name.startswith("time/") for name in log[0]), "the split of a step is read a step later"
    for before, record in pairwise(log):
        parts = {name: record[f"time/{name}"] for name in PARTS}
        whole = config.train.global_batch / before["samples_per_second"]
        assert sum(parts.values()) == pytest.approx(whole, rel=0.2)
        assert all(parts[name] > 0 for name in ("wait", "forward", "gather", "loss", "backward", "optimizer", "other"))
        assert parts["forward"] + parts["backward"] > 0.3 * whole
    assert all(record["peak_memory_gb"] > 0.1 for record in log)


def test_mfu_is_of_the_stated_peak(seen):
    log, _, config = seen
    flops = PairFlops(build_model(config, (0.5,) * 3, (0.25,) * 3, pretrained=False))
    assert flops.passes == [3, 3]
    least = config.train.global_batch * flops.training([8]) / (1e12 * config.tracking.peak_tflops)
    most = config.train.global_batch * flops.training([config.data.max_tokens]) / (1e12 * config.tracking.peak_tflops)
    for record in log:
        seconds = config.train.global_batch / record["samples_per_second"]
        assert least < record["mfu"] * seconds < most


def test_a_profile_names_the_places_of_the_dearest_operations(seen):
    _, directory, _ = seen
    table = (directory / "profile/steps_2-2_rank_0.txt").read_text().splitlines()
    assert len(table) == 11
    assert any("aten::" in line and "train/model/" in line for line in table)
    assert any("(backward)" in line for line in table)
    trace = json.loads(gzip.decompress((directory / "profile/steps_2-2_rank_0.json.gz").read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"forward", "backward", "optimizer", "loss"} <= names, "the parts of a step are regions"


def test_time_counts_for_the_innermost_part():
    took: list[float] = []
    with StepClock(torch.device("cpu")) as clock:
        for number in range(3):
            began = time.perf_counter()
            clock.begin(measure=number != 1)
            with section("loss"):
                time.sleep(0.02)
                with section("gather"):
                    time.sleep(0.04)
                time.sleep(0.02)
            split = clock.end()
            took.append(time.perf_counter() - began)
            if number == 1:
                assert split["loss"] >= 0.04 and split["gather"] >= 0.04, "before and after what is inside of it"
                assert sum(split.values()) <= took[0], "nothing counts twice"
            else:
                assert split == {}
    assert timing._clock is None


def test_what_backward_does_after_the_last_gradient_is_exchange():
    weight = torch.ones(4, requires_grad=True)

    def late(_):
        torch.autograd.Variable._execution_engine.queue_callback(lambda: time.sleep(0.05))

    weight.register_hook(late)  # as DDP does it
    with StepClock(torch.device("cpu")) as clock:
        for _ in range(2):
            clock.begin(measure=True)
            with section("backward"):
                loss = (weight * 2).sum()
                exchange_from_end_of(loss)
                loss.backward()
            split = clock.end()
    assert split["exchange"] >= 0.05


@pytest.mark.parametrize("steps", ["3", "0:2", "5:4", "a:b"])
def test_steps_to_profile_are_checked(tmp_path, steps):
    config = small_run(tmp_path, steps=3)
    config.tracking.profile = steps
    with pytest.raises(ValueError, match=rf"tracking.profile {steps}: give the first and the last step, such as 20:22"):
        check(config)


def test_a_tower_that_never_learns_goes_forward_only(tmp_path):
    config = small_run(tmp_path, steps=3)
    config.model.image.locked_until = -1
    model = build_model(config, (0.5,) * 3, (0.25,) * 3, pretrained=False)
    flops = PairFlops(model)
    assert flops.passes == [1, 3]
    batch = model.blank_micro_batch(2, 16)
    assert float(flops.of([batch])) == pytest.approx(2 * flops.training([16, 16]))


def test_nothing_is_dear_where_nothing_was_done():
    assert dearest([], on_gpu=False) == []
