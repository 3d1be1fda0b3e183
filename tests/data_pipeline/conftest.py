"""Small real data sets for the tests of the data pipeline."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from PIL import Image

from data_pipeline.storage.manifest import write_manifest
from data_pipeline.storage.shards import ShardWriter
from tests.support.tars import describe

# No time limit per example: the machine may be busy.
settings.register_profile("duet", deadline=None)
settings.load_profile("duet")


def tiny_image(number: int, *, size: tuple[int, int] = (24, 20), kind: str = "png") -> bytes:
    """An encoded RGB picture that differs from number to number."""
    image = Image.new("RGB", size, (number * 37 % 256, number * 91 % 256, number * 53 % 256))
    image.paste((255, 255, 255), (number % size[0], 0, number % size[0] + 3, size[1]))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def tiny_shards(tmp_path: Path) -> Callable[..., Path]:
    """Make a directory of tar shards with a manifest: sizes[i] samples in shard i, png or jpg, two captions in json."""

    def make(sizes: Sequence[int] = (5, 4, 3), *, name: str = "shards") -> Path:
        directory = tmp_path / name
        number, paths = 0, []
        for shard, size in enumerate(sizes):
            with ShardWriter(directory, "train", first=shard) as writer:
                for _ in range(size):
                    kind = "png" if number % 2 else "jpeg"
                    captions = f'{{"captions": ["picture {number}", "number {number} of the {name}"]}}'
                    members = {kind: tiny_image(number, kind=kind), "json": captions.encode()}
                    writer.write(f"{number:05d}", members)
                    number += 1
            paths += writer.paths
        write_manifest(directory, [describe(path) for path in paths], {})
        return directory

    return make
