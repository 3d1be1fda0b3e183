"""A trained model in the form that other libraries read, verified while it is written.

python -m train.export --run runs/quickstart --to torch OUT
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from train import cli
from train.export import TARGETS

SOUP = (
    "average the weights of these checkpoints; with greedy, or greedy:STEP,STEP, only of those, from the best one on, "
    "that do not lower recall on the run's data.val"
)
OPTIONS = ("run", "step", "soup", "to", "crop", "python")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.export", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--run", required=True, help="run directory")
    parser.add_argument("--to", required=True, help=f"{', '.join(TARGETS)}")
    parser.add_argument("--step", default="", help="best, or a number of steps; default: the newest checkpoint")
    parser.add_argument("--soup", default="", metavar="STEP,STEP", help=SOUP)
    parser.add_argument("--crop", type=float, help="data.eval_crop of what is exported; default: as in the run")
    parser.add_argument("--python", default="", help="open_clip: an interpreter that has it; default: this one")
    parser.add_argument("out", metavar="OUT", help="directory that is not there yet")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the user's mistake, or an export that differs from the model."""
    options = cli.expanded(make_parser().parse_args(argv))
    return cli.exit_status(lambda: _export(options), OPTIONS)


def _export(options: argparse.Namespace) -> None:
    from train.export.soup import in_words  # after parsing: --help answers without loading torch
    from train.export.source import load_source
    from train.export.target import export, find_target

    greedily = options.soup.partition(":")[0] == "greedy"
    listed = options.soup.removeprefix("greedy").removeprefix(":") if greedily else options.soup
    soup = listed.split(",") if listed else []
    target = find_target(options.to, options.python)
    source = load_source(options.run, options.step, soup, greedily=greedily, crop=options.crop)
    lines = in_words(source.tried) + export(source, target, Path(options.out))
    print("\n".join([*lines, f"written: {options.out}"]))


if __name__ == "__main__":
    sys.exit(main())
