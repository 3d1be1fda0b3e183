"""A small real run as the launch tests use it, and what it must have become."""

import signal
from pathlib import Path

from tests.launch.slurm import wait_for
from tests.train import running
from tests.train.running import curve, metrics, run_dir
from train import checkpoint, loop
from train.config import RunConfig
from train.preemption import SIGNALS


def small_run(directory: Path, steps: int) -> RunConfig:
    """The configuration of a run without held-out data, of two micro-batches a step; writes its data to `directory`."""
    config = running.prepare(directory, steps=steps, global_batch=2 * running.MICRO_BATCH)
    config.data.val, config.checkpoint.keep = "", 2
    return config


def finish(config: RunConfig) -> list[tuple[int, str, float]]:
    """Run it, or what is left of it, in this process; the whole curve."""
    handlers = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS}
    try:
        assert loop.run(config) == 0
    finally:
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


def assert_close(found: list, expected: list) -> None:
    """The same samples in the same order; losses equal to 1e-4 in the first six steps, while rounding has not grown."""
    assert [entry[:2] for entry in found] == [entry[:2] for entry in expected]
    for (step, _, loss), (_, _, wanted) in zip(found, expected, strict=True):
        tolerance = 1e-4 if step <= 6 else 5e-3
        assert abs(loss - wanted) <= tolerance * wanted, f"step {step}: {loss} instead of {wanted}"
