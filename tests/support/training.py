"""A small real run as the launch tests use it, and what it must have become."""

import signal
from pathlib import Path

import torch

from tests.support import running
from tests.support.running import curve, metrics, run_dir
from tests.support.slurm import wait_for
from train import checkpoint, loop
from train.config import RunConfig
from train.run.signals import SIGNALS


def small_run(directory: Path, steps: int) -> RunConfig:
    """The configuration of a run without held-out data, of two micro-batches a step; writes its data to `directory`."""
    config = running.prepare(directory, steps=steps, global_batch=2 * running.MICRO_BATCH)
    config.data.val, config.checkpoint.keep = "", 2
    return config


def finish(config: RunConfig) -> list[tuple[int, str, float]]:
    """Run it, or what is left of it, in this process, with one thread as in the others; the whole curve."""
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert loop.run(config) == 0
    finally:
        torch.set_num_threads(threads)
        for name, handler in handlers.items():
            signal.signal(getattr(signal, name), handler)
    return curve(config)


def wait_for_step(config: RunConfig, step: int, log: Path) -> None:
    """Until the run has logged this step; shows `log` where it does not in five minutes."""

    def there() -> bool:
        return any(record["step"] >= step for record in metrics(config))

    try:
        wait_for(there, f"step {step}", 300)
    except AssertionError as error:
        raise AssertionError(log.read_text() if log.exists() else "nothing has started") from error


def saved_step(config: RunConfig) -> int:
    """The step of the newest checkpoint that is whole."""
    found = checkpoint.newest(run_dir(config))
    assert found is not None
    return checkpoint.load_state(found).step
