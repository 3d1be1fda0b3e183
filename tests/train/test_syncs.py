"""The host waits for the device once in a step: when it reads what the step has measured."""

from collections import Counter

import pytest

from tests.support import training
from tests.support.running import prepare
from tests.support.syncs import Syncs
from train import loop

STEPS = 2


@pytest.mark.parametrize(("resident", "smoothing"), [(2, 0.0), (1, 0.1)])
def test_the_host_waits_once_in_a_step(tmp_path, monkeypatch, resident, smoothing):
    config = prepare(tmp_path, steps=STEPS)
    config.data.val, config.tracking.diagnostics_every, config.train.resident = "", 0, resident
    config.loss.mask_duplicates, config.loss.label_smoothing = True, smoothing
    waits: list[Counter[str]] = []
    step, to_host = loop.training_step, loop.distributed.to_host

    def watched_step(*arguments):
        with Syncs() as syncs:
            metrics = step(*arguments)
        waits.append(syncs.at)
        return metrics

    def watched_reading(tensors):
        with Syncs() as syncs:
            read = to_host(tensors)
        waits[-1] += syncs.at
        return read

    monkeypatch.setattr(loop, "training_step", watched_step)
    monkeypatch.setattr(loop.distributed, "to_host", watched_reading)
    training.finish(config)
    assert len(waits) == STEPS
    for at in waits:
        assert [place.split()[1] for place in at] == ["cpu"] and sum(at.values()) == 1, at
