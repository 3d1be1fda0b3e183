"""Embeds shards, a folder of images or a list of texts with a model, into an index that can be searched and curated.

python -m train.embed --model runs/quickstart data/demo/openmoji/val index
accelerate launch -m train.embed --model runs/quickstart --step best data/train index
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from train import cli

OPTIONS = ("model", "step", "batch", "workers")
HELP = """\
INPUT: a manifest or its directory; tars ('data/{000..010}.tar'); a folder of images; a .txt file with a text per line.
OUT: images.npy and texts.npy, float32 unit vectors; their keys in .parquet of the same names; what could not be read in
bad.jsonl. The same command resumes one that was interrupted.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.embed",
        description=(__doc__ or "").partition("\n")[0],
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="a run, one of its checkpoints, or an export --to torch")
    parser.add_argument("--step", default="", help="of a run: best, or a number of steps; default: the newest")
    parser.add_argument("--batch", type=int, default=0, help="rows of a forward pass; default: the run's eval.batch")
    parser.add_argument("--workers", type=int, default=1, help="loader processes of each rank (1)")
    parser.add_argument("--precision", default="", choices=["bf16", "fp32"], help="default: as the run was trained")
    parser.add_argument("input", metavar="INPUT", help="what to embed")
    parser.add_argument("out", metavar="OUT", help="directory for the index")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the user's mistake."""
    options = cli.expanded(make_parser().parse_args(argv))
    return cli.exit_status(lambda: _embed(options), OPTIONS)


def _embed(options: argparse.Namespace) -> None:
    if options.batch < 0 or options.workers < 0:
        name = "batch" if options.batch < 0 else "workers"
        raise ValueError(f"{name} {getattr(options, name)}: give 0 or more")
    from data_pipeline.embeddings.inputs import find_input  # after parsing: --help answers without loading torch

    given = find_input(options.input)
    from train.engine.start import start
    from train.use.embed import embed
    from train.use.towers import load_towers

    accelerator = start()
    towers = load_towers(options.model, options.step, precision=options.precision, device=accelerator.device)
    if made := embed(towers, given, Path(options.out), batch=options.batch, workers=options.workers):
        print(made, *([given.note] if given.note else []), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
