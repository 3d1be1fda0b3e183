"""What is written is read back, by webdataset too; what is interrupted leaves whole shards."""

import hashlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.storage.shards import ShardWriter, read_index
from tests.support.tars import (
    LONG,
    SAMPLES,
    contents,
)


def test_webdataset_reads_what_duet_writes(tmp_path):
    samples = [*SAMPLES, (LONG, {"png": b"p", "txt": "名".encode()}), ("ключ", {"seg.png": b""})]
    with ShardWriter(tmp_path, "train") as writer:
        for key, members in samples:
            writer.write(key, members)
    (path,) = writer.paths
    assert contents(path) == samples
    streamed = list(webdataset.WebDataset(path, shardshuffle=False))
    assert [sample["__key__"] for sample in streamed] == [key for key, _ in samples]
    for sample, (_, members) in zip(streamed, samples, strict=True):
        assert {extension: sample[extension] for extension in members} == members


def test_the_same_samples_make_the_same_bytes(tmp_path):
    written = []
    for name, flip in (("a", False), ("b", True)):
        with ShardWriter(tmp_path / name, "s") as writer:
            for key, members in [*SAMPLES, (LONG, {"txt": b"t"})]:
                writer.write(key, dict(reversed(members.items())) if flip else members)
        written.append(Path(writer.paths[0]).read_bytes())
    assert written[0] == written[1]
    assert hashlib.sha256(written[0]).hexdigest() == "a4006c4f0a80f62025f23fc222abff5af9e1de11677b6196ff49a768c334604c"


def test_shards_begin_before_a_limit_is_passed(tmp_path):
    with ShardWriter(tmp_path / "n", "s", max_samples=3, first=7) as writer:
        for number in range(7):
            writer.write(str(number), {"txt": b"c"})
    assert [Path(path).name for path in writer.paths] == ["s-000007.tar", "s-000008.tar", "s-000009.tar"]
    assert [len(read_index(path)) for path in writer.paths] == [3, 3, 1]
    with ShardWriter(tmp_path / "b", "s", max_bytes=1000) as writer:
        for number, size in enumerate([400, 600, 1, 5000, 1]):
            writer.write(str(number), {"jpg": bytes(size)})
    assert [[entry.key for entry in read_index(path)] for path in writer.paths] == [["0", "1"], ["2"], ["3"], ["4"]]


@pytest.mark.parametrize(
    ("key", "members"),
    [
        ("a.b", {"txt": b""}),
        ("", {"txt": b""}),
        ("dir/", {"txt": b""}),
        ("/a", {"txt": b""}),
        ("a", {"TXT": b""}),
        ("a", {"": b""}),
        ("a", {"x/y": b""}),
        ("a\0", {"txt": b""}),
        ("__a", {"x__": b""}),
        ("a", {}),
    ],
)
def test_samples_that_would_not_be_read_back_are_refused(key, members, tmp_path):
    with ShardWriter(tmp_path, "s") as writer:
        writer.write("good", {"txt": b"c"})
        with pytest.raises(ValueError, match="sample"):
            writer.write(key, members)
        with pytest.raises(ValueError, match="twice in shard s-000000"):
            writer.write("good", {"jpg": b"c"})
    assert contents(writer.paths[0]) == [("good", {"txt": b"c"})]


@settings(max_examples=30)
@given(st.dictionaries(st.text(max_size=6), st.binary(max_size=40), min_size=1, max_size=6))
def test_what_is_written_is_read_back_or_refused(tmp_path_factory, texts):
    directory = tmp_path_factory.mktemp("written")
    accepted = []
    with ShardWriter(directory, "s") as writer:
        for key, data in texts.items():
            try:
                writer.write(key, {"txt": data})
                accepted.append((key, {"txt": data}))
            except ValueError:
                pass
    assert [sample for path in writer.paths for sample in contents(path)] == accepted
    shutil.rmtree(directory)


def test_an_exception_discards_the_shard_begun(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, "s", max_samples=2) as writer:
        for number in range(3):
            writer.write(str(number), {"txt": b"c"})
        raise RuntimeError
    assert [file.name for file in tmp_path.iterdir()] == ["s-000000.tar"]


CHILD = """
import resource, signal, sys
from data_pipeline.storage.shards import ShardWriter
directory, mode, per_shard, total = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
if mode == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
with ShardWriter(directory, "s", max_samples=per_shard) as writer:
    for number in range(total):
        writer.write(str(number), {"jpg": bytes(3000)})
    if mode == "wait":
        print("begun", flush=True)
        sys.stdin.read()
"""


def child(*arguments):
    return [sys.executable, "-c", CHILD, *map(str, arguments)]


@pytest.mark.parametrize(("per_shard", "total"), [(100, 100), (13, 13), (13, 14)])
def test_a_full_disk_leaves_whole_shards_only(per_shard, total, tmp_path):
    """The limit on the size of a file stands in for the disk's end: while a shard is written, and while it is closed.

    13 samples of 3,584 bytes stay below it; the end of the archive does not.
    """
    command = child(tmp_path, "full", per_shard, total)
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False)
    assert result.returncode == 1 and "File too large" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_whole_shards_and_a_part(tmp_path):
    command = child(tmp_path, "wait", 15, 40)
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=Path(__file__).parents[3]) as process:
        assert process.stdout.readline() == b"begun\n"
        process.send_signal(signal.SIGKILL)
    assert {path.name for path in tmp_path.iterdir()} == {"s-000000.tar", "s-000001.tar", "s-000002.tar.part"}
    assert [len(read_index(path)) for path in sorted(tmp_path.glob("*.tar"))] == [15, 15]
