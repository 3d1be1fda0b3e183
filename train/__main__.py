"""Train: `accelerate launch -m train --config train/configs/seed.yaml --data.train SHARDS`."""

from __future__ import annotations

import os
import sys

from train import cli


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 finished, 1 a failure, 2 the user's mistake, 85 a signal (state saved), 130 interrupted."""
    try:
        return cli.exit_status(lambda: _train(argv))
    except RuntimeError as error:
        from torch import distributed as dist

        from data_pipeline.loader import LoaderFailure
        from data_pipeline.storage.redaction import redact_urls

        if isinstance(error, LoaderFailure):
            print(f"error: {redact_urls(str(error))}", file=sys.stderr, flush=True)
            return 1
        collective = isinstance(error, dist.DistError) or "gloo/transport" in str(error)
        if not (collective and dist.is_initialized()):
            raise
        print(
            f"error: rank {dist.get_rank()} has lost the other ranks ({str(error).splitlines()[0]}): a "
            "process, a host or the network is gone. The newest checkpoint is whole, the same command resumes from it",
            *getattr(error, "__notes__", ()),
            sep="\n",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # the ordinary way out may wait for the lost


def _train(argv: list[str] | None) -> int:
    config = cli.parse(argv)
    from train import loop  # after parsing: --help and a mistake answer without loading torch
    from train.engine.start import stop

    status = loop.run(config)
    stop()
    return status


if __name__ == "__main__":
    sys.exit(main())
