"""Command line of the data pipeline: python -m data_pipeline {demo,pack,index,verify,inspect} ...

Exit codes: 0 done; 1 verify found differences; 2 bad input or a full disk, with the remedy; 130 interrupted by Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from data_pipeline.storage.redaction import redact_urls

COMMANDS = {
    "demo": ("data_pipeline.demo.command", "fetch a small real corpus and write it as train and held-out shards"),
    "pack": (
        "data_pipeline.commands.pack",
        "write shards from a folder, CSV, TSV, JSONL, Parquet or datasets directory",
    ),
    "index": ("data_pipeline.commands.index", "write the manifest of shards: samples, sha256, statistics"),
    "verify": ("data_pipeline.commands.verify", "check every shard of a manifest against its sha256"),
    "inspect": ("data_pipeline.commands.inspect", "show counts, sizes, caption lengths, and a sheet of samples"),
}
"""Subcommand -> module with HELP (shown below its flags), add_arguments(parser) and run(args) -> exit code, imported
when asked for; what it does in a line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m data_pipeline", allow_abbrev=False)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    command = None
    try:
        for name, (module, summary) in COMMANDS.items():
            subparser = subparsers.add_parser(name, help=summary, description=summary, allow_abbrev=False)
            if arguments[:1] == [name]:
                command = importlib.import_module(module)
                subparser.formatter_class = argparse.RawDescriptionHelpFormatter
                subparser.epilog = command.HELP
                command.add_arguments(subparser)
        parsed = parser.parse_args(arguments)
        assert command is not None, "argparse lets nothing through but the names of subcommands"
        return command.run(parsed)
    except (ValueError, OSError) as error:
        print(f"error: {redact_urls(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"\ninterrupted: {redact_urls(str(error))}" if error.args else "\ninterrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files and samples need not be UTF-8
    sys.exit(main())
