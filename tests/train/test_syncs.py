"""The host waits for the device once in a step: when it reads what the step has measured."""

from collections import Counter

import pytest

from tests.support import training
from tests.support.running import prepare
from tests.support.syncs import Syncs
from train import loop

STEPS = 2


@pytest.fixture
def waits(monkeypatch) -> list[Counter[str]]:
    """Of every step that the loop makes from now on, until its numbers are read."""
    found: list[Counter[str]] = []
    step, to_host = loop.training_step, loop.distributed.to_host

    def watched_step(*arguments):
        with Syncs() as syncs:
            metrics = step(*arguments)
        found.append(syncs.at)
        return metrics

    def watched_reading(tensors):
        with Syncs() as syncs:
            read = to_host(tensors)
        found[-1] += syncs.at
        return read

    monkeypatch.setattr(loop, "training_step", watched_step)
    monkeypatch.setattr(loop.distributed, "to_host", watched_reading)
    return found


def by_operator(waits: list[Counter[str]]) -> list[dict[str, int]]:
    return [dict(Counter(place.split()[1] for place in at.elements())) for at in waits]


@pytest.mark.parametrize(("resident", "smoothing"), [(2, 0.0), (1, 0.1)])
def test_the_host_waits_once_in_a_step(tmp_path, waits, resident, smoothing):
    config = prepare(tmp_path, steps=STEPS)
    config.data.val, config.tracking.diagnostics_every, config.train.resident = "", 0, resident
    config.loss.mask_duplicates, config.loss.label_smoothing = True, smoothing
    training.finish(config)
    assert by_operator(waits) == [{"cpu": 1}] * STEPS, waits


def test_a_measured_step_waits_once_more_for_eigenvalues(tmp_path, waits):
    config = prepare(tmp_path, steps=STEPS)
    config.data.val, config.tracking.diagnostics_every, config.optim.clip_grad = "", 1, 0.1
    training.finish(config)
    assert by_operator(waits) == [{"cpu": 1, "_linalg_eigh": 1}] * STEPS, waits
