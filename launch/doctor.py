"""Look before renting: python -m launch.doctor [--json] [--config RUN.yaml] [--field value ...]

Checks this host and the run that the config describes. Under a launcher it checks all ranks together, as in
./launch/multinode.sh --module launch.doctor --config RUN.yaml. Exit status: 0 ok or warnings, 1 a failure, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
from collections.abc import Callable
from dataclasses import replace

from launch import host_checks, run_checks
from launch.findings import Finding, as_json, fail, table, worst
from train import cli, distributed
from train.engine.start import start


def examine(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """A check's findings, of each the worst among the ranks; the same list on every rank.

    A check that breaks is itself a finding, and the other checks still run.
    """
    try:
        own = check()
    except Exception as error:
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        own = [fail(name, cli.with_flags(text), "the message above names what is wrong")]
    return worst_of_ranks(distributed.broadcast_object(distributed.gather_objects((socket.gethostname(), own))))


def worst_of_ranks(everywhere: list[tuple[str, list[Finding]]]) -> list[Finding]:
    """The worst of each finding; where not all ranks have it, it says which rank does, and on which host.

    everywhere: host and findings of each rank.
    """
    merged: list[Finding] = []
    for position in range(max(len(findings) for _, findings in everywhere)):
        column = [
            (rank, host, findings[position])
            for rank, (host, findings) in enumerate(everywhere)
            if position < len(findings)
        ]
        status = worst(finding for _, _, finding in column)
        who = [(rank, host, finding) for rank, host, finding in column if finding.status == status]
        rank, host, finding = who[0]
        if status != "ok" and len(who) < len(everywhere):
            others = f" and {len(who) - 1} more" if len(who) > 1 else ""
            finding = replace(finding, measured=f"rank {rank} on {host}{others}: {finding.measured}")
        merged.append(finding)
    return merged


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.doctor", description=__doc__, allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options, run = parser.parse_known_args(argv)
    return cli.exit_status(lambda: _examine_all(run, options.json))


def _examine_all(run: list[str], json_asked: bool) -> int:
    config = cli.parse(run)
    start()
    findings = [
        *examine("versions", host_checks.versions),
        *examine("devices", host_checks.devices),
        *examine("configuration", lambda: run_checks.configuration(config)),
        *examine("memory plan", lambda: host_checks.memory(config)),
        *examine("collectives", host_checks.collectives),
        *examine("clock skew", host_checks.clocks),
        *examine("runs directory", lambda: host_checks.shared_files(config)),
        *examine("host", lambda: host_checks.host(config)),
        *examine("pretrained weights", lambda: run_checks.weights(config)),
        *examine("data", lambda: run_checks.data(config)),
        *examine("held-out data", lambda: run_checks.held_out(config)),
        *examine("W&B", lambda: run_checks.wandb(config)),
    ]
    if distributed.is_main():
        print(json.dumps(as_json(findings), indent=2) if json_asked else table(findings), flush=True)
    distributed.barrier()
    return 1 if worst(findings) == "fail" else 0


if __name__ == "__main__":
    sys.exit(main())
