"""What has happened in a step, on all ranks: metrics as numbers, bad samples, signals; counted in the run's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from data_pipeline.batch import MicroBatch
from train import distributed
from train.engine.meter import MEASURED
from train.run.directory import onward

if TYPE_CHECKING:
    from train.loop import Run


class News(NamedTuple):
    """What has happened on all ranks in a step.

    signals, unwritten: ranks that have got a signal, or could not write a log or a checkpoint. digests: which sample
    was in which row of the global batch, by the names of shards and samples, and by the content of the shards. tally:
    for `Tally.add`.
    """

    bad_samples: int
    signals: int
    unwritten: int
    digests: dict[str, str]
    tally: list[int]


def agree(
    run: Run, micro_batches: Sequence[MicroBatch], metrics: Mapping[str, Tensor | float]
) -> tuple[dict[str, float], News]:
    """Metrics as numbers, and what has happened on all ranks; here, once in a step, the host waits for the device."""
    bad = sum(len(batch.bad) for batch in micro_batches)
    digests = [sum(getattr(batch, name) for batch in micro_batches) for name in ("digest", "content")]
    signed = [(digest + 2**63) % 2**64 - 2**63 for digest in digests]  # modulo 2^64, as int64
    unwritten = bool(run.tracker.problem or run.saver.failed)
    own = [bad, bool(run.stop.name), unwritten, *signed, *run.tally.count(micro_batches)]
    own_on_device = torch.tensor(own, dtype=torch.int64).to(run.engine.device, non_blocking=True)
    on_device = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    counts, *values = distributed.to_host([distributed.all_reduce_sum(own_on_device), *on_device.values()])
    read = dict(zip(on_device, (value.item() for value in values), strict=True))
    numbers = {name: read[name] if name in read else float(value) for name, value in metrics.items()}
    if numbers["skipped"]:  # there was no update to measure
        numbers = {name: value for name, value in numbers.items() if not name.startswith(MEASURED)}
    bad, signals, unwritten, *both = counts[:5].tolist()
    names = {"batch_digest": both[0], "content_digest": both[1]}
    hexadecimal = {name: f"{digest % 2**64:016x}" for name, digest in names.items()}
    news = News(bad, signals, unwritten, hexadecimal, counts[5:].tolist())
    return numbers | {"skipped": int(numbers["skipped"])}, news


def account(run: Run, micro_batches: Sequence[MicroBatch], metrics: dict, news: News, seconds: float) -> str:
    """Count one more step in the state and write the ledger; a collective.

    Returns:
        The signal for which all ranks stop, "" for none.

    Raises:
        ValueError: on all ranks, over `data.max_bad_fraction` or `train.max_skipped`, or where a log or a
            checkpoint could not be written.
        RuntimeError: on all ranks, where samples that were assigned are neither trained nor replaced.
    """
    config, state = run.config, run.state
    if news.unwritten:
        run.tracker.check()
        run.saver.check()
    run.tally.add(state.step, news.tally)
    state.step += 1
    state.samples_seen += config.train.global_batch
    state.seconds += seconds
    state.bad_samples += news.bad_samples
    state.skipped += metrics["skipped"]
    state.skipped_in_row = state.skipped_in_row + 1 if metrics["skipped"] else 0
    if news.bad_samples:
        own = [record for batch in micro_batches for record in batch.bad]
        run.tracker.ledger([record for records in distributed.gather_objects(own) for record in records])
    # Ten, because one bad sample in the first batch would already be a large share of the samples seen.
    seen = (state.step - state.first_step) * config.train.global_batch
    if state.bad_samples > max(10, config.data.max_bad_fraction * seen):
        raise ValueError(
            f"data.max_bad_fraction {config.data.max_bad_fraction}: {state.bad_samples} of {seen} samples were bad; "
            f"{run.directory / 'ledger.jsonl'} lists them with their causes. Raise it to resume, or mend them and "
            f"train under another `name`{onward(run.directory)}"
        )
    if state.skipped_in_row > config.train.max_skipped:
        raise ValueError(
            f"train.max_skipped {config.train.max_skipped}: no finite gradient in the last {state.skipped_in_row} "
            "steps. Resume in fp32 or with a larger train.max_skipped, or train with a lower optim.lr under another "
            f"`name`{onward(run.directory)}"
        )
    return (run.stop.name or "a signal to another rank") if news.signals else ""
