"""pack under kill -9, Ctrl-C, a full disk and a rival: whole shards only, and in the end the same bytes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from data_pipeline.__main__ import main
from data_pipeline.storage.shards import ShardReader
from tests.support.pack_inputs import (
    RECORDS,
    content,
    group_is_gone,
    many,
    run_pack,
    samples,
    skipped,
    start,
    wait_for_shards,
    write_csv,
    write_pictures,
)


@pytest.fixture(name="folder")
def picture_folder(tmp_path: Path) -> Path:
    return write_pictures(tmp_path / "input")


def test_any_number_of_workers_and_any_kill_give_the_same_bytes(folder, tmp_path):
    table, flags = many(folder, 160), ["--shard-size", 20, "--workers"]
    for workers in (1, 3):
        process = start("pack", table, tmp_path / f"workers{workers}", *flags, workers)
        assert process.communicate() is not None
        assert process.returncode == 0
    expected = content(tmp_path / "workers1")
    assert len(expected) == 8 + 3  # shards, manifest.json, pack.json, skipped.jsonl
    assert content(tmp_path / "workers3") == expected

    out, kills = tmp_path / "killed", 0
    for shards in (1, 3, 6):
        process = start("pack", table, out, *flags, 2)
        wait_for_shards(process, out, shards)
        time.sleep(0.01 * kills)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        assert group_is_gone(process), "workers outlive kill -9 of the command"
        names = sorted(path.name for path in out.glob("*.tar"))
        for name in names:
            assert (out / name).read_bytes() == expected[name]
    assert kills >= 2
    process = start("pack", table, out, *flags, 2)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "continuing" in errors
    assert content(out) == expected


def test_a_shard_that_the_state_does_not_know_yet_is_written_again(folder, tmp_path):
    """Killed between the renaming of a shard and the saving of the state."""
    table = write_csv(folder / "t.csv", RECORDS)
    out = tmp_path / "out"
    run_pack(table, out, "--shard-size", 2)
    expected = content(out)
    state = json.loads((out / "pack.json").read_text())
    state.update(rows=2, shards=1, samples=2, complete=False)
    (out / "pack.json").write_text(json.dumps(state))
    (out / "manifest.json").unlink()
    (out / "shard-000001.tar.part").write_bytes(b"begun")
    (out / "skipped.jsonl").write_text("written after the state was saved\n")
    assert run_pack(table, out, "--shard-size", 2) == 0
    assert content(out) == expected


def test_shards_without_their_manifest_are_continued_from(folder, tmp_path, capsys):
    """Killed between the last shard and the manifest."""
    table, out = write_csv(folder / "t.csv", RECORDS), tmp_path / "out"
    run_pack(table, out)
    expected = content(out)
    (out / "manifest.json").unlink()
    capsys.readouterr()
    assert run_pack(table, out) == 0
    assert "continuing: 1 complete shards" in capsys.readouterr().err
    assert content(out) == expected


def test_a_manifest_of_the_shards_so_far_is_replaced(folder, tmp_path, capsys):
    table, out = write_csv(folder / "t.csv", RECORDS), tmp_path / "out"
    run_pack(table, out, "--shard-size", 2)
    expected = content(out)
    state = json.loads((out / "pack.json").read_text())
    state.update(rows=2, shards=1, samples=2, complete=False)
    (out / "pack.json").write_text(json.dumps(state))
    for written in (out / "manifest.json", *out.glob("shard-00000[12].tar")):
        written.unlink()
    assert main(["index", str(out)]) == 0
    assert run_pack(table, out, "--shard-size", 2) == 0
    assert content(out) == expected
    assert "packed already" not in capsys.readouterr().out
    assert run_pack(table, folder / "../out", "--shard-size", 2) == 0
    assert "packed already" in capsys.readouterr().out
    (out / "manifest.json").write_text("{}")
    assert run_pack(table, out, "--shard-size", 2) == 0
    assert content(out) == expected


def test_ctrl_c_says_what_is_kept_and_the_next_call_goes_on(folder, tmp_path):
    table, out = many(folder, 160), tmp_path / "out"
    process = start("pack", table, out, "--shard-size", 20, "--workers", 2)
    wait_for_shards(process, out, 3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert group_is_gone(process)
    assert not list(out.glob("*.part"))
    # All but one that was complete but not yet recorded as such, which is written again.
    recorded = json.loads((out / "pack.json").read_text())["shards"]
    assert f"{recorded} complete shards with {20 * recorded} samples are kept" in errors
    assert len(list(out.glob("*.tar"))) - 1 <= recorded < 8
    assert recorded >= 2
    before = {path.name: path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))[:recorded]}
    process = start("pack", table, out, "--shard-size", 20, "--workers", 2)
    assert "continuing" in process.communicate()[1]
    assert process.returncode == 0
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    assert len(samples(out)) + len(skipped(out)) == 160


def test_a_full_disk_leaves_complete_shards_only(folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("a small file system cannot be mounted here (needs root)")
    try:
        table, out = many(folder, 100), disk / "out"
        process = start("pack", table, out, "--shard-size", 5, "--workers", 2)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2, errors
        assert "Traceback" not in errors
        assert "the disk is full" in errors
        assert "the same command" in errors
        shards = sorted(out.glob("*.tar"))
        assert shards
        assert not list(out.glob("*.part"))
        assert sum(len(ShardReader(path)) for path in shards) == 5 * len(shards)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        process = start("pack", table, out, "--shard-size", 5, "--workers", 2)
        assert "continuing" in process.communicate()[1]
        assert process.returncode == 0
        assert run_pack(table, tmp_path / "undisturbed", "--shard-size", 5) == 0
        assert content(out) == content(tmp_path / "undisturbed")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_packs_into_one_directory(folder, tmp_path, capsys):
    table, out = many(folder, 160), tmp_path / "out"
    process = start("pack", table, out, "--shard-size", 20, "--workers", 1)
    wait_for_shards(process, out, 1)
    process.send_signal(signal.SIGSTOP)
    try:
        assert run_pack(table, out, "--shard-size", 20) == 2
        assert "another pack is writing" in capsys.readouterr().err
    finally:
        process.send_signal(signal.SIGCONT)
    process.communicate()
    assert process.returncode == 0
