"""Finds in an index of `train.embed` what is nearest to a text or an image.

python -m train.search --index index "a red flag" --page flags.html
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from train import cli

OPTIONS = ("index", "model", "step", "top", "among", "page")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.search", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--index", required=True, help="what train.embed wrote")
    parser.add_argument("--model", default="", help="run or export that the index is of; default: where it was then")
    parser.add_argument("--step", default="", help="of a run given as --model: best, or a number of steps")
    parser.add_argument("--among", default="", choices=["images", "texts"], help="default: images, where there are any")
    parser.add_argument("--top", type=int, default=10, help="how many to show (10)")
    parser.add_argument("--page", default="", metavar="FILE.html", help="write a page with the pictures, too")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("query", metavar="QUERY", nargs="+", help="a text, or the path of an image")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 2 the user's mistake."""
    options = make_parser().parse_args(argv)
    return cli.exit_status(lambda: _search(options), OPTIONS)


def _search(options: argparse.Namespace) -> None:
    from data_pipeline.embeddings.index import open_index  # after parsing: --help answers without loading torch

    if options.top < 1:
        raise ValueError(f"top {options.top}: give 1 or more")
    index = open_index(options.index)
    began = time.perf_counter()
    from train.engine.start import own_device
    from train.use.find import check_model, queries, search, table
    from train.use.towers import load_towers

    of, device = index.about["model"], own_device()
    try:
        towers = load_towers(options.model or of["path"], options.step, precision=of["precision"], device=device)
    except ValueError as error:
        if options.model:
            raise
        gone = f"index {options.index}: its model is no longer there ({error}); say where with --model"
        raise ValueError(gone) from error
    check_model(index, towers)
    vectors = queries(towers, options.query)
    loaded, began = time.perf_counter() - began, time.perf_counter()
    answers, how = search(index, options.query, vectors, options.top, options.among)
    seconds = time.perf_counter() - began
    if options.page:
        from train.use.page import write_page

        write_page(Path(options.page), index, answers, how)
    if options.json:
        times = {"search": round(seconds, 4), "model": round(loaded, 3)}
        found = [answer.as_json() for answer in answers]
        print(json.dumps({"index": options.index, "how": how, "seconds": times, "answers": found}))
    else:
        print("\n\n".join(table(answer) for answer in answers))
    kind = options.among or index.kinds[0]
    print(f"{index.about[kind]:,} {kind} in {seconds:.3f} s, {how}; the model took {loaded:.1f} s", file=sys.stderr)
    if options.page:
        print(f"page: {options.page}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
