"""`python -m tests.faults`: runs the tests of every case and prints the table: case, tries, survived, seconds.

A try is one fault that a test makes; tests that make one only count as one. A case without a test is said so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.faults.cases import CASES

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Row:
    """A line of the table."""

    case: int
    what: str
    tests: int = 0
    tries: int = 0
    survived: int = 0
    skipped: int = 0
    seconds: float = 0.0


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 where every fault that was tried was survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--fast", action="store_true", help="leave out the tests that take long")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="run case 18 alone, for so long")
    parser.add_argument("--case", type=int, action="append", choices=sorted(CASES), help="these cases alone")
    parser.add_argument("--tries", type=int, help="how often each random fault is tried")
    args = parser.parse_args(argv)
    environment = dict(os.environ)
    if args.soak:
        environment["DUET_SOAK_MINUTES"] = str(args.soak)
    if args.tries:
        environment["DUET_FAULT_TRIES"] = str(args.tries)
    cases = [18] if args.soak else args.case or sorted(CASES)
    rows = run(cases, environment, fast=args.fast)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print("\n".join(table(rows)))
    return 0 if all(row.tries == row.survived for row in rows) else 1


def run(cases: list[int], environment: dict[str, str], *, fast: bool = False) -> list[Row]:
    """The tests of these cases, by pytest, whose own output goes to stderr."""
    rows = {case: Row(case, CASES[case]) for case in cases}
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory, "report.xml")
        command = [sys.executable, "-m", "pytest", *tests_of(cases), "-q", f"--junitxml={report}"]
        command += ["-m", "not slow"] if fast else []
        subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr, check=False)
        for test in ET.parse(report).getroot().iter("testcase"):
            for case in cases_of(test.get("name", "")):
                if case in rows:
                    add(rows[case], test)
    return list(rows.values())


def tests_of(cases: list[int]) -> list[str]:
    """The tests of these cases; by their names, since importing all tests takes longer than most of these."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        names = re.findall(r"^def (test_case_\w+)", path.read_text(), re.MULTILINE)
        found += [f"{path}::{name}" for name in names if set(cases_of(name)) & set(cases)]
    return found


def cases_of(test: str) -> list[int]:
    """The cases that a test's name begins with: 3 and 5 of test_case_03_05_what_happens."""
    match = re.match(r"test_case((?:_\d\d(?!\d))+)", test)
    return [int(number) for number in match[1].split("_")[1:]] if match else []


def add(row: Row, test: ET.Element) -> None:
    """Count one test in its case."""
    if test.find("skipped") is not None:
        row.skipped += 1
        return
    said = {one.get("name"): one.get("value") for one in test.iter("property")}
    tries = int(said.get("tries") or 1)
    row.tests += 1
    row.tries += tries
    row.survived += tries if test.find("failure") is None and test.find("error") is None else 0
    row.seconds = round(row.seconds + float(test.get("time") or 0), 1)


def table(rows: list[Row]) -> list[str]:
    """As Markdown."""
    lines = ["| case | fault | tries | survived | seconds |", "|--:|---|--:|--:|--:|"]
    for row in rows:
        found = f"{row.tries} | {row.survived}" if row.tries else "no test | " + ("skipped" if row.skipped else "")
        lines.append(f"| {row.case} | {row.what} | {found} | {row.seconds:.0f} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
