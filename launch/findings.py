"""What the doctor finds: one line per check, with the remedy where there is something to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The outcome of one check on one rank, or on all of them together."""

    check: str
    status: Status
    measured: str
    remedy: str = ""


def ok(check: str, measured: str) -> Finding:
    return Finding(check, "ok", measured)


def warn(check: str, measured: str, remedy: str) -> Finding:
    return Finding(check, "warn", measured, remedy)


def fail(check: str, measured: str, remedy: str) -> Finding:
    return Finding(check, "fail", measured, remedy)


def worst(findings: Iterable[Finding]) -> Status:
    """The worst status among the findings; ok where there are none."""
    order: list[Status] = ["ok", "warn", "fail"]
    return max((finding.status for finding in findings), key=order.index, default="ok")


def table(findings: list[Finding]) -> str:
    """A table for people; a remedy is below its line."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<5} {finding.check:<{width}}  {finding.measured}")
        if finding.remedy:
            lines.append(f"{'':<5} {'':<{width}}  -> {finding.remedy}")
    count = {status: sum(finding.status == status for finding in findings) for status in ("ok", "warn", "fail")}
    return "\n".join([*lines, ", ".join(f"{number} {status}" for status, number in count.items())])


def as_json(findings: list[Finding]) -> dict:
    return {"status": worst(findings), "findings": [asdict(finding) for finding in findings]}
