"""`demo`: fetch a small real corpus and write it as shards, split by concept into training and held-out pictures.

    python -m data_pipeline demo                        # emoji drawings and two towers, with pip alone
    python -m data_pipeline demo --corpus openclipart   # clip art, on Debian and Ubuntu, with apt

What pip and apt fetch is data here: it is checked and unpacked, nothing is installed or imported from it. What is there
already is left alone, so the command can be interrupted and repeated at any point.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from data_pipeline.commands.flags import new_folder
from data_pipeline.demo.openclipart import openclipart
from data_pipeline.demo.openmoji import openmoji
from data_pipeline.demo.weights import image_tower, text_tower
from data_pipeline.storage.files import alone_in

CORPORA = {"openmoji": openmoji, "openclipart": openclipart}


HELP = """\
examples:
  python -m data_pipeline demo
  python -m data_pipeline demo data/clipart --corpus openclipart
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "out", nargs="?", default=Path("data/demo"), type=new_folder, help="folder (default: data/demo)"
    )
    parser.add_argument("--corpus", choices=tuple(CORPORA), default="openmoji", help="which pictures")
    parser.add_argument("--limit", type=int, default=0, help="use this many pictures only, for a trial (default: all)")


def run(args: argparse.Namespace) -> int:
    """The command. Raises ValueError when something cannot be fetched or is not what was pinned."""
    if args.limit < 0:
        raise ValueError(f"--limit is {args.limit}: give a number of pictures, or 0 for all")
    out = args.out.expanduser().absolute()
    downloads = out / ".downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    with alone_in(out, f"another demo is writing {out}; wait for it"):
        try:
            if args.corpus == "openmoji":
                for what, tower in (("image tower", image_tower), ("text tower", text_tower)):
                    print(f"{what}: {tower(out / 'models', downloads)}", flush=True)
            record = CORPORA[args.corpus](out / args.corpus, downloads, args.limit)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"what was fetched stays in {out}; the same command continues from there") from None
        shutil.rmtree(downloads)
    print(f"{args.corpus}: {record['train']:,} training pictures in {out / args.corpus / 'train'}")
    print(f"{args.corpus}: {record['val']:,} held-out pictures, one per unseen concept, in {out / args.corpus / 'val'}")
    for cause, count in record["left_out"].items():
        print(f"  left out: {count:,} {cause}")
    return 0
