"""Logs of one JSON object per line with a `step`: read after any crash, cut where a run resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.storage.files import write_atomically

METRICS = "metrics.jsonl"
LEDGER = "ledger.jsonl"
RESULTS = "results.json"


def to_line(record: Mapping[str, Any]) -> str:
    """One line of JSON; a number that is not finite becomes null, which JSON can say."""
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a log; none where there is no file. A line torn by a crash is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def read_history(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of every step in order, those of training and evaluation at the same step in one record."""
    merged: dict[int, dict[str, Any]] = {}
    for record in read_records(Path(run_dir) / METRICS):
        merged.setdefault(record["step"], {}).update(record)
    return [merged[step] for step in sorted(merged)]


def cut(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Leave only the whole lines that `keep` says yes to; the file is replaced at once or not at all."""
    if not path.is_file():
        return
    content = "".join(to_line(record) for record in read_records(path) if keep(record))
    if content.encode() != path.read_bytes():
        write_atomically(path, content)
