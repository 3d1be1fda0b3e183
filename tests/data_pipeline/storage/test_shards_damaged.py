"""Real tars damaged in every way that one cut or one bit can: refused by name, or read in full."""

import bz2
import gzip
import io
import lzma
import os
import shutil
import subprocess
import tarfile

import pytest

from data_pipeline.storage.shards import ShardReader, read_index
from tests.support.tars import (
    LONG,
    SAMPLES,
    WRITERS,
    contents,
    describe,
    forget_index,
    write_tar,
    write_webdataset,
)


@pytest.mark.parametrize("write", WRITERS)
def test_case_07_a_tar_cut_at_any_block_is_refused_by_name(write, tmp_path, record_property):
    """With its manifest always; without one unless the cut is behind the two blocks of zeros that end the archive."""
    samples = [(f"{number:03d}", {"jpg": os.urandom(1500), "txt": b"c"}) for number in range(7)]
    data = write(tmp_path / "whole.tar", samples).read_bytes()
    shard = describe(tmp_path / "whole.tar")
    assert len(data) % 10240 == 0 and len(data) > 20480
    path = tmp_path / "cut.tar"
    end = len(data.rstrip(b"\0")) + 511 & ~511
    for size in range(0, len(data), 512):
        path.write_bytes(data[:size])
        forget_index(path)
        if size < end + 1024:
            with pytest.raises(ValueError, match=r"cut\.tar"):
                read_index(path)
        else:
            assert contents(path) == contents(tmp_path / "whole.tar")
        with pytest.raises(ValueError, match=r"whole\.tar has \d+ bytes, its manifest says \d+"):
            ShardReader(path, shard)
    path.write_bytes(data)
    assert contents(path) == contents(path, shard) == contents(tmp_path / "whole.tar")
    record_property("tries", len(data) // 512)


@pytest.mark.skipif(shutil.which("bsdtar") is None, reason="bsdtar is not installed")
@pytest.mark.parametrize("form", ["ustar", "pax", "gnutar"])
def test_tars_of_bsdtar_are_read(form, tmp_path):
    for key, members in SAMPLES:
        for extension, data in members.items():
            (tmp_path / f"{key}.{extension}").write_bytes(data)
    names = sorted(f"{key}.{extension}" for key, members in SAMPLES for extension in members)
    options = ["--format", form, "--options", "", "-b", "1"]
    subprocess.run(["bsdtar", "-c", *options, "-f", tmp_path / "a.tar", *names], cwd=tmp_path, check=True)
    assert (tmp_path / "a.tar").stat().st_size % 10240
    assert [(key, dict(members)) for key, members in contents(tmp_path / "a.tar")] == SAMPLES


@pytest.mark.parametrize(
    ("form", "compress"),
    [
        ("gzip", gzip.compress),
        ("bzip2", bz2.compress),
        ("xz", lzma.compress),
        ("zstd", lambda data: b"\x28\xb5\x2f\xfd" + data),
    ],
)
def test_compressed_tars_say_so(form, compress, tmp_path):
    path = write_webdataset(tmp_path / "a.tar", SAMPLES)
    path.write_bytes(compress(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"a\.tar is compressed \({form}\).* unpack it"):
        read_index(path)


def header_bytes(data):
    """Positions of a tar's header bytes, those of extended headers (pax records) without their padding included."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            for block in range(member.offset, member.offset_data, 512):
                is_records = block > member.offset and block + 512 < member.offset_data
                yield from range(block, block + (len(data[block : block + 512].rstrip(b"\0")) if is_records else 512))


@pytest.mark.parametrize("write", WRITERS)
def test_case_07_no_single_bit_of_a_header_changes_what_is_read(write, tmp_path, record_property):
    path = write(tmp_path / "flipped.tar", [("000", {"txt": b"a"}), ("001", {"txt": b"b"})])
    data = path.read_bytes()
    whole = contents(path)
    forget_index(path)
    refused = accepted = 0
    with path.open("r+b", buffering=0) as file:
        for position in header_bytes(data):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([data[position] ^ 1 << bit]), position)
                try:
                    found = contents(path)
                except ValueError as error:
                    assert "flipped.tar" in str(error)
                    refused += 1
                else:
                    forget_index(path)
                    assert found == whole
                    accepted += 1
            os.pwrite(file.fileno(), data[position : position + 1], position)
    # Accepted: a checksum field that still has its value (a leading 0 turned into a space), times in pax records.
    assert accepted < 600 and refused > 8_000
    record_property("tries", accepted + refused)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_case_07_damage_in_long_names_is_refused_or_leaves_samples_readable(form, tmp_path):
    """Long names are in blocks without a checksum: the manifest's sha256 covers them, and nothing here may crash."""
    path = write_tar(tmp_path / "a.tar", [(f"{LONG}.jpg", b"i"), (f"{LONG}.txt", b"t")], form=form)
    data = path.read_bytes()
    end = data.rindex(LONG[:80].encode()) + 300
    for position in range(512, end, 11):
        forget_index(path)
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            samples = contents(path)
        except ValueError as error:
            assert "a.tar" in str(error)
        else:
            assert sum(len(members) for _, members in samples) in (1, 2)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "b.jpg", "a.txt"], "key a is in it twice"),
        (["a.txt", "a.txt"], "key a has two members .txt"),
        (["a.JPG", "a.jpg"], "key a has two members .jpg"),
        (["README"], "holds no samples"),
        ([], "is an empty tar"),
    ],
)
def test_case_08_repeated_keys_and_empty_tars_are_refused(names, message, tmp_path):
    path = write_tar(tmp_path / "a.tar", [(name, b"x") for name in names])
    with pytest.raises(ValueError, match=message) as error:
        read_index(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_case_17_links_and_devices_are_refused(kind, tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a.txt")
        member.type, member.linkname = kind, "/etc/hostname"
        tar.addfile(member)
    with pytest.raises(ValueError, match=r"a\.txt is no plain file"):
        read_index(path)


def test_what_is_no_tar_is_refused_by_name(tmp_path):
    path = write_webdataset(tmp_path / "a.tar", SAMPLES)
    appended = tmp_path / "two.tar"
    appended.write_bytes(path.read_bytes() * 2)
    with pytest.raises(ValueError, match=r"two\.tar: .* another tar was appended"):
        read_index(appended)
    garbage = tmp_path / "garbage.tar"
    garbage.write_bytes(os.urandom(10240))
    with pytest.raises(ValueError, match=r"garbage\.tar is no whole tar"):
        read_index(garbage)
    with pytest.raises(ValueError, match=r"no shard at .*missing\.tar"):
        read_index(tmp_path / "missing.tar")


def test_case_12_a_shard_that_is_not_its_manifests_is_refused(tmp_path):
    path = write_webdataset(tmp_path / "a.tar", SAMPLES)
    shard = describe(path)
    write_webdataset(path, [(key, {"jpg": bytes(6000)}) for key, _ in SAMPLES[:2]])
    assert path.stat().st_size == shard.filesize
    with pytest.raises(ValueError, match=r"a\.tar has 2 samples, its manifest says 3"):
        ShardReader(path, shard)
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.tar of the manifest does not exist"):
        ShardReader(path, shard)


def test_a_shard_that_shrinks_while_in_use_is_refused(tmp_path):
    path = write_webdataset(tmp_path / "a.tar", SAMPLES)
    reader = ShardReader(path)
    os.truncate(path, 1024)
    with pytest.raises(ValueError, match=r"a\.tar: it ends early or was changed"):
        reader.raw(2)
