"""Tars for tests: written by webdataset, GNU tar, Python and Duet, and read back."""

import hashlib
import io
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import webdataset

from data_pipeline.storage.manifest import Shard, write_manifest
from data_pipeline.storage.shards import ShardReader, ShardWriter, read_index

SAMPLES = [(f"{number:03d}", {"txt": f"no. {number}".encode(), "jpg": bytes([number]) * 700}) for number in range(3)]
LONG = "directory/" * 12 + "x" * 90


def write_tar(path, members, *, form=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_webdataset(path, samples):
    with webdataset.TarWriter(str(path)) as writer:
        for key, members in samples:
            writer.write({"__key__": key, **members})
    return path


def contents(path, shard=None):
    """All samples of a tar: key and members."""
    reader = ShardReader(path, shard)
    samples = [reader.raw(index) for index in range(len(reader))]
    reader.close()
    for sample in samples:
        del sample["__shard__"]
    return [(sample.pop("__key__"), sample) for sample in samples]


def forget_index(path):
    Path(f"{path}.idx").unlink(missing_ok=True)


def write_gnu_tar(path, samples):
    for key, members in samples:
        for extension, data in members.items():
            (path.parent / f"{key}.{extension}").write_bytes(data)
    names = [f"{key}.{extension}" for key, members in samples for extension in members]
    subprocess.run(["tar", "-cf", path.name, *names], cwd=path.parent, check=True)
    return path


def write_duet(path, samples):
    with ShardWriter(path.parent, "duet") as writer:
        for key, members in samples:
            writer.write(key, members)
    return Path(writer.paths[0]).rename(path)


def write_shards(
    directory: Path, sizes: Sequence[int], sample: Callable[[int], tuple[str, dict[str, bytes]]], prefix: str = "train"
) -> Path:
    """Shards of sizes[i] samples and their manifest; `sample` gives the key and members of sample number 0, 1, ..."""
    number, paths = 0, []
    for shard, size in enumerate(sizes):
        with ShardWriter(directory, prefix, first=shard) as writer:
            for _ in range(size):
                writer.write(*sample(number))
                number += 1
        paths += writer.paths
    write_manifest(directory, [describe(path) for path in paths], {})
    return directory


WRITERS = [write_webdataset, write_gnu_tar, write_duet]


def describe(path: str | Path) -> Shard:
    """The manifest's entry for a tar that is whole."""
    data = Path(path).read_bytes()
    return Shard(str(path), len(read_index(path)), len(data), hashlib.sha256(data).hexdigest())
