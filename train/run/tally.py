"""The ledger's sums: of every source and epoch, the samples assigned are those trained and those replaced.

What is assigned follows from the order alone. What was trained, as it is or in another's place, is counted in the
micro-batches that the ranks trained on, and summed over ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from data_pipeline.batch import MicroBatch
from data_pipeline.order import Mixture, Order


class Tally:
    """Adds up a run's samples, step after step.

    Args:
        order: of the run's samples; None for a stream, which has one source and no epochs.
        batch: rows of the global batch.
        sums: "source/epoch" -> [assigned, trained, replaced], which `add` changes; empty at the start of a run.
        steps: that this run has made so far; where `sums` do not have them all, as in a run that an older version
            began, nothing is said of the whole.
        moved_by: a step of the run is this many steps further in the order.
    """

    def __init__(
        self, order: Order | Mixture | None, batch: int, sums: dict[str, list[int]], steps: int, moved_by: int = 0
    ):
        self.batch, self.moved_by = batch, moved_by
        orders = order.orders if isinstance(order, Mixture) else [order]
        self.rows = [one.batch if one else batch for one in orders]
        self.steps_per_epoch = [one.steps_per_epoch if one else None for one in orders]
        self.sums = sums
        self.is_whole = sum(assigned for assigned, _, _ in sums.values()) == steps * batch

    def count(self, micro_batches: Iterable[MicroBatch]) -> list[int]:
        """Of these micro-batches, for every source: rows that are what was assigned; rows that replace a bad sample."""
        rows, replaced = Counter[int](), Counter[int]()
        for batch in micro_batches:
            first = batch.index * len(batch.sources)
            rows.update(batch.sources)
            replaced.update(batch.sources[row - first] for row in {record["row"] for record in batch.bad})
        sources = range(len(self.rows))
        return [count for source in sources for count in (rows[source] - replaced[source], replaced[source])]

    def add(self, step: int, counts: Sequence[int]) -> None:
        """Add what `count` found, summed over ranks. Raises RuntimeError where it is not what the order assigns."""
        for source, (trained, replaced) in enumerate(zip(counts[::2], counts[1::2], strict=True)):
            assigned, steps = self.rows[source], self.steps_per_epoch[source]
            if trained + replaced != assigned:
                raise RuntimeError(
                    f"step {step}: {assigned} samples of source {source} were assigned, but {trained} trained and "
                    f"{replaced} replaced"
                )
            sums = self.sums.setdefault(f"{source}/{(step + self.moved_by) // steps if steps else 0}", [0, 0, 0])
            for place, value in enumerate((assigned, trained, replaced)):
                sums[place] += value

    def records(self) -> list[dict[str, int]]:
        """The sums of every source and epoch."""
        return [
            {"source": int(source), "epoch": int(epoch), "assigned": assigned, "trained": trained, "replaced": replaced}
            for (source, _, epoch), (assigned, trained, replaced) in (
                (name.partition("/"), sums) for name, sums in self.sums.items()
            )
        ]

    def totals(self) -> dict[str, int]:
        """The sums of all."""
        records = self.records()
        return {name: sum(record[name] for record in records) for name in ("assigned", "trained", "replaced")}

    def lines(self, steps: int, listed: int) -> list[str]:
        """What is said of it at the end of a run: of all, of each source where there are several, and a warning where a
        whole tally and the run's other counts differ, as where lines of the ledger were lost with the machine's power.

        steps: that this run has made. listed: rows of which the ledger says that their sample was replaced.
        """
        records, found = self.records(), [("samples", self.totals())]
        if len(self.rows) > 1:
            for source in range(len(self.rows)):
                own = [record for record in records if record["source"] == source]
                sums = {name: sum(record[name] for record in own) for name in found[0][1]}
                found.append((f"source {source}, {len(own)} epochs begun", sums))
        text = "{}: {assigned:,} assigned = {trained:,} trained + {replaced:,} replaced"
        lines = [text.format(what, **sums) for what, sums in found]
        whole = found[0][1]
        if self.is_whole and (whole["assigned"], whole["replaced"]) != (steps * self.batch, listed):
            lines.append(
                f"warning: the sums do not add up: {steps * self.batch:,} samples were seen, and ledger.jsonl lists "
                f"{listed:,} as replaced"
            )
        return lines


def replaced_rows(ledger: Iterable[dict[str, Any]]) -> int:
    """Rows whose sample was replaced, by the ledger's records: in a stream, a row may have several bad ones."""
    return len({(record["step"], record["row"]) for record in ledger})
