"""The ledger's sums, against batches counted by hand, and against what a run of two sources and epochs has done."""

import json
from pathlib import Path

import pytest
import torch

from data_pipeline.batch import MicroBatch
from data_pipeline.config import Source
from data_pipeline.order import Mixture
from tests.support.running import prepare, run_dir
from tests.support.small import write_data
from train import loop
from train.run.tally import Tally, replaced_rows

ORDER = Mixture([[10], [7]], [2, 1], batch=6, lanes=1, seed=0, shuffle_shards=1)  # 4 rows of 10, 2 of 7


def micro_batch(index: int, sources: list[int], *bad: int) -> MicroBatch:
    none = torch.zeros(0)
    records = [{"row": row} for row in bad]
    return MicroBatch(none, none, none, index=index, step=0, keys=[], bad=records, sources=sources)


def test_rows_are_counted_by_source_and_only_once_however_many_were_bad() -> None:
    tally = Tally(ORDER, 6, {}, 0)
    batches = [micro_batch(0, [0, 1, 0], 1, 1, 2), micro_batch(1, [0, 1, 0], 3)]
    assert tally.count(batches) == [2, 2, 1, 1]
    tally.add(0, [2, 2, 1, 1])
    tally.add(2, [4, 0, 2, 0])
    tally.add(3, [4, 0, 2, 0])
    assert tally.sums == {"0/0": [4, 2, 2], "1/0": [4, 3, 1], "0/1": [8, 8, 0], "1/1": [2, 2, 0]}
    assert tally.lines(3, 3)[0] == "samples: 18 assigned = 15 trained + 3 replaced"
    assert tally.lines(3, 3)[1:] == [
        "source 0, 2 epochs begun: 12 assigned = 10 trained + 2 replaced",
        "source 1, 2 epochs begun: 6 assigned = 5 trained + 1 replaced",
    ]
    assert "24 samples were seen" in tally.lines(4, 3)[-1] and "lists 2 as" in tally.lines(3, 2)[-1]
    assert len(Tally(ORDER, 6, tally.sums, 4).lines(4, 3)) == 3  # begun by an older version
    moved = Tally(ORDER, 6, {}, 0, moved_by=2)
    moved.add(0, [4, 0, 2, 0])
    assert list(moved.sums) == ["0/1", "1/0"]


def test_a_row_that_is_missing_or_of_another_source_is_not_passed_over() -> None:
    for counts in ([3, 0, 2, 0], [4, 0, 1, 0], [3, 0, 3, 0], [4, 1, 2, 0]):
        with pytest.raises(RuntimeError, match=r"step 5: \d samples of source \d were assigned, but \d trained and"):
            Tally(ORDER, 6, {}, 0).add(5, counts)


def test_replaced_rows_of_a_ledger() -> None:
    assert replaced_rows({"step": step, "row": row} for step, row in ((0, 1), (0, 1), (1, 1))) == 2


@pytest.mark.usefixtures("runs_in_this_process")
def test_case_08_a_run_says_what_became_of_every_sample(tmp_path: Path, capfd) -> None:
    config = prepare(tmp_path, steps=4, global_batch=16, micro_batch=8)
    config.data.train = [
        Source(str(write_data(tmp_path / "a", (30,), bad=(3, 17))), 1.0),
        Source(str(write_data(tmp_path / "b", (20,), bad=(5,))), 1.0),
    ]
    config.data.val, config.data.image_size = "", 32
    assert loop.run(config) == 0
    ledger = [json.loads(line) for line in (run_dir(config) / "ledger.jsonl").read_text().splitlines()]
    results = json.loads((run_dir(config) / "results.json").read_text())
    replaced = replaced_rows(ledger)
    assert results["bad_samples"] == replaced == len(ledger) >= 3
    sums = {(one["source"], one["epoch"]): one["assigned"] for one in results["samples"]}
    assert sums == {(0, 0): 24, (0, 1): 8, (1, 0): 16, (1, 1): 16}
    assert all(one["assigned"] == one["trained"] + one["replaced"] for one in results["samples"])
    said = capfd.readouterr().out
    assert f"samples: 64 assigned = {64 - replaced} trained + {replaced} replaced" in said
    assert "do not add up" not in said
    logged = [json.loads(line) for line in (run_dir(config) / "metrics.jsonl").read_text().splitlines()]
    assert logged[-1] == {
        "step": 4,
        "samples/assigned": 64,
        "samples/trained": 64 - replaced,
        "samples/replaced": replaced,
    }
