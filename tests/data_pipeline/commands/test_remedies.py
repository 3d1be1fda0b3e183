"""What `index` and `pack` advise works: the mistake is made, the advice is followed, and the command succeeds."""

import bz2
import gzip
import lzma
import re
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from data_pipeline.__main__ import main
from data_pipeline.storage.manifest import load_manifest
from tests.support.pack_inputs import run_pack, samples
from tests.support.pictures import tiny_image
from tests.support.server import serve
from tests.support.tars import write_tar

GOOD = [("a.png", tiny_image(1)), ("a.txt", b"text")]


def command(*arguments: object) -> int:
    return main([*map(str, arguments), "--workers", "1"])


def follow(message: str, **placeholders: object) -> int:
    """Run the `python -m data_pipeline ...` that a message ends with."""
    advised = shlex.split(message.rpartition("python -m data_pipeline ")[2].splitlines()[0])
    return command(*(str(placeholders.get(word, word)) for word in advised))


def shell(message: str, before: str, **placeholders: object) -> None:
    """Run the shell command that follows `before` in a message."""
    line = message.partition(before)[2].splitlines()[0]
    for name, value in placeholders.items():
        line = re.sub(rf"\b{re.escape(name)}\b", str(value), line)
    subprocess.run(line, shell=True, check=True)


def needs(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


@pytest.fixture
def error(capsys):
    """A function that runs a command which is refused, and returns its message."""

    def refused(*arguments: object) -> str:
        assert command(*arguments) == 2
        return capsys.readouterr().err

    return refused


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for name, data in GOOD:
            file.writestr(name, data)


@pytest.mark.parametrize("form", ["gzip", "bzip2", "xz", "zip"])
def test_a_compressed_shard_is_unpacked_as_advised(tmp_path, error, form):
    old = write_tar(tmp_path / "old.tar", GOOD)
    if form == "zip":
        write_zip(old)
    else:
        old.write_bytes({"gzip": gzip, "bzip2": bz2, "xz": lzma}[form].compress(old.read_bytes()))
    needs("unzip" if form == "zip" else form)
    message = error("index", old)
    assert "--leave-out-unusable" not in message, "nothing would be left"
    (tmp_path / "files").mkdir()
    shell(message, "such as with: ", OLD=old, FOLDER=tmp_path / "files", **{"NEW.tar": tmp_path / "new.tar"})
    assert command("index", tmp_path / "new.tar") == 0
    assert load_manifest(tmp_path).nsamples == 1


@pytest.mark.parametrize(("end", "form"), [(".tar.gz", gzip), (".tgz", gzip), (".tar.bz2", bz2), (".tar.xz", lzma)])
def test_a_folder_of_compressed_tars_is_read_when_they_are_unpacked_as_advised(tmp_path, error, end, form):
    tar = write_tar(tmp_path / "a.tar", GOOD)
    (tmp_path / f"a{end}").write_bytes(form.compress(tar.read_bytes()))
    tar.unlink()
    needs({gzip: "gzip", bz2: "bzip2", lzma: "xz"}[form])
    shell(error("index", tmp_path), "such as: ")
    assert command("index", tmp_path) == 0


@pytest.mark.parametrize(
    ("members", "cause"),
    [([("b.txt", b"text"), *GOOD, ("b.png", tiny_image(2))], "is in it twice"), (None, "is no plain file")],
)
def test_a_tar_is_written_again_as_advised(tmp_path, error, members, cause):
    files = tmp_path / "files"
    files.mkdir()
    if members is None:
        (files / "a.png").write_bytes(tiny_image(1))
        (files / "b.png").hardlink_to(files / "a.png")
        (files / "a.txt").write_text("a")
        (files / "b.txt").symlink_to("a.txt")
        subprocess.run(["tar", "-cf", tmp_path / "old.tar", *sorted(path.name for path in files.iterdir())], cwd=files)
    else:
        write_tar(tmp_path / "old.tar", members)
        subprocess.run(["tar", "-xf", tmp_path / "old.tar", "-C", files], check=True)
    message = error("index", tmp_path / "old.tar")
    assert cause in message
    shell(message, "such as with: ", FOLDER=files, **{"NEW.tar": tmp_path / "new.tar"})
    assert command("index", tmp_path / "new.tar") == 0
    assert load_manifest(tmp_path).nsamples == 2


@pytest.mark.parametrize("others", [True, False])
def test_the_pattern_for_tars_in_folders_below_needs_nothing_else(tmp_path, error, others):
    for name in ("x/a.tar", "y/a.tar", *(["a.tar"] if others else [])):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, GOOD)
    message = error("index", tmp_path)
    pattern = f"{tmp_path}/**/*.tar"
    assert f"'{pattern}'" in message
    assert command("index", pattern) == 0
    assert load_manifest(tmp_path).nsamples == load_manifest(pattern).nsamples == 2 + others


@pytest.mark.parametrize("name", ["", "manifest.json", "other.json"])
def test_a_missing_manifest_is_made_as_advised(tmp_path, error, name):
    (tmp_path / "my data").mkdir()
    write_tar(tmp_path / "my data/a.tar", GOOD)
    assert follow(error("verify", tmp_path / "my data" / name)) == 0
    assert command("verify", tmp_path / "my data" / name) == 0


def test_a_manifest_that_is_not_beside_its_shards_is_made_as_advised(tmp_path, error):
    write_tar(tmp_path / "a.tar", GOOD)
    (tmp_path / "m").mkdir()
    for content in (None, "{", '{"__kind__": "other"}'):
        if content:
            (tmp_path / "m/x.json").write_text(content)
        assert follow(error("verify", tmp_path / "m/x.json"), SHARDS=tmp_path) == 0
        assert command("verify", tmp_path / "m/x.json") == 0


def test_a_missing_manifest_of_remote_shards_names_the_steps(tmp_path, error):
    with serve(tmp_path) as server:
        message = error("verify", f"{server.url}/x")
        assert f"python -m data_pipeline index {server.url}/x/ --out manifest.json (and copy that beside" in message


def test_tars_and_urls_get_what_is_meant(tmp_path, error):
    (tmp_path / "my data").mkdir()
    write_tar(tmp_path / "my data/a.tar", GOOD)
    for source in (tmp_path / "my data", tmp_path / "my data/a.tar"):
        assert follow(error("pack", source, tmp_path / "out")) == 0


@pytest.mark.parametrize(
    ("name", "first"),
    [("cc.tsv", "a dog on grass\thttp://host/a.jpg"), ("urls.txt", "http://host/a.jpg"), ("t.csv", "a.png,a dog")],
)
def test_a_row_of_names_is_put_above_a_table_as_advised(tmp_path, error, name, first):
    """As Conceptual Captions comes: without a header."""
    (tmp_path / name).write_text(f"{first}\n")
    (tmp_path / "a.png").write_bytes(tiny_image(1))
    header = error("pack", tmp_path / name, tmp_path / "out").rpartition("such as: ")[2]
    (tmp_path / name).write_text(header + first + "\n")
    if name == "t.csv":
        assert run_pack(tmp_path / name, tmp_path / "out") == 0
        return
    kind = "tsv" if name == "cc.tsv" else "csv"
    message = error("pack", tmp_path / name, tmp_path / "out")
    assert f"img2dataset --url_list {tmp_path / name} --input_format {kind} --url_col 'url'" in message
    assert ("--caption_col 'caption'" in message) is (kind == "tsv")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "txt"])
def test_a_column_of_images_that_holds_urls_alone_gets_the_command_that_fetches_them(tmp_path, error, kind):
    row = '{"image": "https://host/a.jpg?key=5ec7e7", "text": "one"}' if kind == "jsonl" else "https://host/a.jpg\tone"
    (tmp_path / f"t.{kind}").write_text(row + "\n" if kind == "jsonl" else f"image\ttext\n{row}\n")
    message = error("pack", tmp_path / f"t.{kind}", tmp_path / "out")
    form = "jsonl" if kind == "jsonl" else "tsv"  # by what is in it
    assert f"--input_format {form} --url_col 'image' --caption_col 'text'" in message and "5ec7e7" not in message


@pytest.mark.parametrize("code", ["utf-16", "latin-1"])
def test_a_table_in_another_code_is_written_again_as_advised(tmp_path, error, code):
    (tmp_path / "a.png").write_bytes(tiny_image(1))
    (tmp_path / "t.csv").write_bytes("image,caption\na.png,caf\u00e9\n".encode(code))
    shell(error("pack", tmp_path / "t.csv", tmp_path / "out"), "such as with: ", NEW=tmp_path / "new")
    assert run_pack(tmp_path / "new.csv", tmp_path / "out") == 0
    assert samples(tmp_path / "out")[0]["txt"].decode() == "caf\u00e9"


def test_json_of_another_form_is_written_as_advised(tmp_path, error):
    (tmp_path / "a.jpg").write_bytes(tiny_image(1))
    (tmp_path / "t.json").write_text('{"a.jpg": "text"}')
    message = error("pack", tmp_path / "t.json", tmp_path / "out")
    (tmp_path / "t.json").write_text(message.rpartition("such as ")[2])
    assert run_pack(tmp_path / "t.json", tmp_path / "out") == 0


@pytest.mark.parametrize("name", ["t.csv.gz", "images.zip", "images.tar.gz"])
def test_what_is_compressed_is_named_so(tmp_path, error, name):
    (tmp_path / name).write_bytes(b"")
    assert "is compressed: unpack it" in error("pack", tmp_path / name, tmp_path / "out")
