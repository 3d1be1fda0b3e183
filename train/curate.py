"""Chooses samples by an index of `train.embed`: CLIP scores, copies within the data, and copies of held-out images.

python -m train.curate --index train-index --held-out val-index --drop-duplicates --keep-best 0.5 --out data/best.json

Without --out it says what it would drop. The new manifest selects samples of the same tars, which stay as they are;
training, `inspect` and `verify` read it like any other.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.storage.files import write_atomically
from train import cli

OPTIONS = ("index", "out", "workers", "cosine")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.curate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--index", required=True, help="of the shards to choose from")
    parser.add_argument("--held-out", action="append", default=[], metavar="INDEX", help="drop copies of its images")
    parser.add_argument("--drop-duplicates", action="store_true", help="drop copies of earlier images")
    parser.add_argument("--keep-best", type=float, metavar="SHARE", help="of what is left then, by CLIP score")
    parser.add_argument("--cosine", type=float, help="least cosine of two images whose pixels are compared (0.8)")
    parser.add_argument("--out", default="", metavar="MANIFEST.json", help="manifest of the samples that are kept")
    parser.add_argument("--dropped", default="", metavar="FILE.jsonl", help="a record of each sample that was dropped")
    parser.add_argument("--scores", default="", metavar="FILE.npy", help="CLIP scores of all samples, in their order")
    parser.add_argument("--workers", type=int, default=1, help="processes that measure the samples kept, for --out (1)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the user's mistake."""
    options = cli.expanded(make_parser().parse_args(argv))
    return cli.exit_status(lambda: _curate(options), OPTIONS, (ValueError, OSError))


def _curate(options: argparse.Namespace) -> None:
    import numpy as np

    from data_pipeline.embeddings.duplicates import COSINE, copies, duplicates
    from data_pipeline.embeddings.index import TEXTS, open_index
    from data_pipeline.storage.manifest import manifest_path
    from train.use.curate import Choice, clip_scores, distribution, drop_copies, keep_best, write_choice

    if options.keep_best is not None and not 0 < options.keep_best <= 1:
        raise ValueError(f"--keep-best {options.keep_best}: give a share above 0 and at most 1, such as 0.3")
    cosine = COSINE if options.cosine is None else options.cosine
    if not -1 <= cosine <= 1:
        raise ValueError(f"--cosine {cosine}: give a cosine from -1 to 1, such as {COSINE}")
    if options.out:
        manifest_path(Path(options.out))
    for flag in ("dropped", "scores"):
        if (given := getattr(options, flag)) and Path(given).is_dir():
            raise ValueError(f"--{flag} {given} is a directory: give a file")
    index = open_index(options.index)
    choice = Choice(np.ones(index.about["input"]["samples"], bool))
    for path in options.held_out:
        try:
            held_out = open_index(path)
        except ValueError as error:
            raise ValueError(f"--held-out: {error}") from error
        drop_copies(choice, copies(index, held_out, cosine), "leak", f"copies of images of {path}")
    if options.drop_duplicates:
        drop_copies(choice, duplicates(index, cosine), "duplicate", "copies of earlier images")
    if options.keep_best is not None or options.scores or (TEXTS in index.kinds and index.about["images"]):
        scores = clip_scores(index)
        print(distribution(scores))
        if options.scores:
            np.save(options.scores, scores)
        if options.keep_best is not None:
            keep_best(choice, scores, options.keep_best)
    for rule in choice.rules:
        print(f"dropped {rule}")
    print(f"kept {int(choice.kept.sum()):,} of {len(choice.kept):,} samples")
    if options.dropped:
        lines = "".join(f"{json.dumps(record)}\n" for record in choice.dropped)
        write_atomically(Path(options.dropped), lines)
    if options.out:
        write_choice(index, choice, Path(options.out), options.workers)
        print(f"written: {options.out}")


if __name__ == "__main__":
    sys.exit(main())
