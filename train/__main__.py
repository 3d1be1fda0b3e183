"""Train: `accelerate launch -m train --config train/configs/seed.yaml --data.train SHARDS`."""

from __future__ import annotations

import os
import sys

from train import cli


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 finished, 2 the user's mistake, 85 stopped by a signal with its state saved, 130 interrupted."""
    try:
        config = cli.parse(argv)
        from train import loop  # after parsing: --help and a mistake answer without loading torch

        return loop.run(config)
    except ValueError as error:
        if os.environ.get("DUET_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
