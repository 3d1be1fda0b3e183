"""Where all randomness of a run comes from: `train.seed`, and the place in the run that it is used for.

Nothing else enters: not the process, the loader worker or the clock. So every place draws the same numbers wherever,
and however often, it is computed. Text seeds a random.Random, which hashes it with SHA-512.
"""

from __future__ import annotations

import hashlib


def sample_seed(seed: int, source: int, epoch: int, position: int) -> str:
    """Of a sample's augmentation and caption: by its place in the order, whichever sample takes that place."""
    return f"{seed}/{source}/{epoch}/{position}"


def view_seed(sample: str) -> str:
    """Of the second view of the sample with seed `sample`."""
    return f"{sample}/view"


def mask_seed(sample: str) -> str:
    """Of the hidden words of the sample with seed `sample`."""
    return f"{sample}/mask"


def stream_seed(seed: int, start_step: int) -> str:
    """Of a stream, which shuffles in another way each time that a run is resumed."""
    return f"{seed}/{start_step}"


def stream_epoch_seed(stream: str, epoch: int) -> str:
    """Of the order of shards and samples in one pass of the stream with seed `stream`."""
    return f"{stream}/{epoch}"


def stream_sample_seed(stream: str, step: int, row: int) -> str:
    """As sample_seed, in the stream with seed `stream`: by the row of the global batch."""
    return f"{stream}/{step}/{row}"


def shards_key(source: int, epoch: int) -> tuple[int, ...]:
    """Beside the run's seed, the key of the permutation of a source's shards."""
    return source, epoch


def group_key(source: int, epoch: int, lane: int, group: int) -> tuple[int, ...]:
    """Beside the run's seed, the key of the permutation of the samples of a group of shards in a lane."""
    return source, epoch, lane, group


def model_seed(seed: int) -> int:
    """Of a model's fresh weights."""
    return seed


def micro_batch_seed(seed: int, step: int, index: int) -> int:
    """Of dropout in micro-batch `index` of a step."""
    return hash63(f"{seed}/{step}/{index}")


def hash63(text: str) -> int:
    """63 bits of a hash (BLAKE2b): a number for int64 tensors that is equal for equal texts."""
    # Names of files and tar members need not be UTF-8; surrogateescape gives their bytes back.
    data = text.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big") >> 1
