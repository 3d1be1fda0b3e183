"""Reads back what a W&B run holds, from the files that `wandb sync` uploads."""

import json
import struct
from pathlib import Path

from wandb.proto import wandb_internal_pb2


def records(path: Path) -> list:
    """Records of a .wandb file: a LevelDB log (blocks of 32,768 bytes, a header of 7 bytes first) of protobufs."""
    data, position, whole, found = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + 7])
        if kind == 0:
            break
        whole += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # full, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def offline_runs(directory: Path) -> list[list]:
    """The records of each session, oldest first."""
    return [records(path) for path in sorted(directory.glob("wandb/offline-run-*/*.wandb"))]


def history(session: list) -> list[dict]:
    points = []
    for record in session:
        if record.WhichOneof("record_type") == "history":
            items = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            points.append({name: value for name, value in items.items() if not name.startswith("_")})
    return points


def run_of(session: list):
    return next(record.run for record in session if record.WhichOneof("record_type") == "run")
