"""The results as a file, and as tables to read, in Markdown; without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def tables(results: dict[str, Any]) -> str:
    """One table for each stage: a line for each row, a column for each number."""
    return "\n".join(line for name, stage in results["stages"].items() for line in _table(name, stage))


def _table(name: str, stage: dict[str, Any]) -> Iterator[str]:
    yield f"\n## {name}: {stage['state']}, {stage.get('seconds', 0):.0f} s"
    if error := stage.get("error"):
        yield f"\n    {error}".replace("\n", "\n    ")
    rows = stage["rows"]
    simple = {row: {key: value for key, value in found.items() if _is_cell(key, value)} for row, found in rows.items()}
    columns = list(dict.fromkeys(key for row in simple.values() for key in row))
    if columns:
        yield f"\n| | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}"
    for row, found in simple.items():
        if found:
            yield f"| {row} | {' | '.join(_cell(found.get(key)) for key in columns)} |"
    for row, found in rows.items():
        if error := found.get("error"):
            yield f"\n{row} failed:\n\n    " + error.replace("\n", "\n    ")
        for key, value in found.items():
            if isinstance(value, dict) and value:
                yield f"\n{row}, {key}:\n"
                yield from (f"- {inner}: {_cell(number)}" for inner, number in value.items())


def _is_cell(key: str, value: Any) -> bool:
    return key not in ("took_s", "error") and not isinstance(value, dict)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def last_lines(text: str, count: int = 6) -> str:
    """The end of a traceback, which says what failed."""
    return "\n".join(text.strip().splitlines()[-count:])[-1500:]


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)
