"""Manifests written, moved, loaded from disk and over HTTP; shard patterns; what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.storage.manifest import Manifest, Shard, load_manifest, write_manifest
from data_pipeline.storage.remote import expand, is_remote
from tests.support.server import serve

SHA = "0123456789abcdef" * 4


def shard(url, *, nsamples=3, filesize=10240, sha256=SHA):
    return Shard(str(url), nsamples, filesize, sha256)


def test_a_manifest_is_loaded_as_it_was_written(tiny_shards):
    directory = tiny_shards((5, 4))
    manifest = load_manifest(directory)
    assert manifest == load_manifest(str(directory / "manifest.json"))
    assert manifest.path == str(directory / "manifest.json")
    assert manifest.nsamples == 9 and [shard.nsamples for shard in manifest.shards] == [5, 4]
    assert [shard.url for shard in manifest.shards] == [str(directory / f"train-00000{i}.tar") for i in range(2)]
    write_manifest(directory, manifest.shards, {"mean": [0.1, 0.2, 0.3]})
    again = load_manifest(directory)
    assert again.shards == manifest.shards and again.statistics == {"mean": [0.1, 0.2, 0.3]}


def test_the_file_is_a_wids_shard_index(tiny_shards):
    content = json.loads((tiny_shards((5, 4)) / "manifest.json").read_text())
    assert content["__kind__"] == "wids-shard-index-v1" and content["wids_version"] == 1
    assert [entry["url"] for entry in content["shardlist"]] == ["train-000000.tar", "train-000001.tar"]
    assert [entry["nsamples"] for entry in content["shardlist"]] == [5, 4]
    assert content["nsamples"] == 9
    assert content["filesize"] == sum(entry["filesize"] for entry in content["shardlist"])


def test_a_directory_can_be_moved_and_keeps_its_hash(tiny_shards, tmp_path):
    directory = tiny_shards((5, 4))
    before = load_manifest(directory)
    moved = directory.rename(tmp_path / "elsewhere")
    after = load_manifest(moved)
    assert all(Path(shard.url).is_file() for shard in after.shards)
    assert after.shards != before.shards and after.hash == before.hash


def test_the_hash_is_of_the_data_and_its_order():
    manifest = Manifest((shard("/a"), shard("/b", nsamples=4)), {}, "/m")
    assert manifest.hash == replace(manifest, path="/n", statistics={"mean": 1}).hash
    assert manifest.hash == Manifest((shard("s3://x/y"), shard("/c", nsamples=4)), {}, "/m").hash
    changed = [
        manifest.shards[::-1],
        manifest.shards[:1],
        (manifest.shards[0], shard("/b", nsamples=5)),
        (manifest.shards[0], shard("/b", nsamples=4, filesize=20480)),
        (manifest.shards[0], shard("/b", nsamples=4, sha256=SHA[::-1])),
    ]
    assert len({manifest.hash, *(Manifest(shards, {}, "/m").hash for shards in changed)}) == 6
    # Frozen: checkpoints of earlier versions hold it.
    assert manifest.hash == "e5b40461baf37eef8e8478c5b9bfc1f7f998774e5a00ee4b0091ab6ec6400e60"


def test_shards_elsewhere_are_named_in_full(tmp_path):
    shards = [shard(tmp_path / "m/below/a.tar"), shard(tmp_path / "other/b.tar"), shard("s3://bucket/c.tar")]
    (tmp_path / "m").mkdir()
    write_manifest(tmp_path / "m/some.json", [*shards, shard(tmp_path / "m/odd:name.tar")], {})
    urls = [entry["url"] for entry in json.loads((tmp_path / "m/some.json").read_text())["shardlist"]]
    assert urls == ["below/a.tar", str(tmp_path / "other/b.tar"), "s3://bucket/c.tar", "./odd:name.tar"]
    loaded = load_manifest(tmp_path / "m/some.json")
    assert loaded.shards == (*shards, shard(tmp_path / "m/odd:name.tar"))


def test_relative_paths_mean_the_working_directory(tiny_shards, monkeypatch):
    directory = tiny_shards((5,))
    expected = load_manifest(directory)
    monkeypatch.chdir(directory.parent)
    assert load_manifest(directory.name) == expected
    assert expand([f"{directory.name}/*.tar"]) == [str(directory / "train-000000.tar")]


def test_a_manifest_is_loaded_over_http(tiny_shards):
    directory = tiny_shards((5, 4))
    with serve(directory) as server:
        for url in (server.url, f"{server.url}/", f"{server.url}/manifest.json"):
            manifest = load_manifest(url)
            assert manifest.path == f"{server.url}/manifest.json"
            assert [shard.url for shard in manifest.shards] == [f"{server.url}/train-00000{i}.tar" for i in range(2)]
            assert manifest.hash == load_manifest(directory).hash
        with pytest.raises(ValueError, match=rf"no manifest at {server.url}/x/manifest\.json; .* index {server.url}/x"):
            load_manifest(f"{server.url}/x")
        server.faults = ["error"]
        with pytest.raises(ValueError, match=rf"{server.url}/manifest\.json could not be read: .*500"):
            load_manifest(server.url)


def test_a_write_that_fails_keeps_the_old_manifest(tiny_shards):
    directory = tiny_shards((5,))
    before = (directory / "manifest.json").read_bytes()
    with pytest.raises(TypeError):
        write_manifest(directory, load_manifest(directory).shards, {"mean": object()})
    (directory / "manifest.json.part").mkdir()  # In the way of the file to be written.
    with pytest.raises(OSError):
        write_manifest(directory, load_manifest(directory).shards, {"mean": 1})
    assert (directory / "manifest.json").read_bytes() == before


def test_a_missing_manifest_names_the_remedy(tmp_path):
    for path in (tmp_path, tmp_path / "manifest.json", tmp_path / "no.json"):
        with pytest.raises(ValueError, match=r"no manifest at .*data_pipeline pack` .* index SHARDS --out /.*\.json$"):
            load_manifest(path)


def _without(field):
    return lambda content: content["shardlist"][1].pop(field)


def _set(field, value):
    return lambda content: content["shardlist"][1].update({field: value})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content.update(__kind__="other"), "__kind__"),
        (lambda content: content.update(shardlist=[]), "holds no shards"),
        (lambda content: content.pop("shardlist"), "holds no shards"),
        (lambda content: content.update(statistics=[]), "statistics are not an object"),
        (lambda content: content["shardlist"].append("a.tar"), r"shardlist\[2\] is not an object"),
        (
            lambda content: content["shardlist"].append(content["shardlist"][0]),
            "tar is in it 2 times",
        ),
        (_without("sha256"), r"shardlist\[1\]\.sha256 is None"),
        (_without("nsamples"), r"shardlist\[1\]\.nsamples is None"),
        (_set("sha256", "../../etc/passwd"), r"sha256 is '\.\./"),
        (_set("nsamples", -1), "nsamples is -1"),
        (_set("nsamples", True), "nsamples is True"),
        (_set("nsamples", 2.0), "nsamples is 2.0"),
        (_set("filesize", 0), "filesize is 0"),
        (_set("filesize", "10240"), "filesize is '10240'"),
        (_set("url", ""), "url is ''"),
        (_set("url", 5), "url is 5"),
        (_set("url", "pipe:cat a.tar"), "nothing is read from pipe:"),
        (_set("url", "http://h/a.tar::http://h/b.tar"), "joined by ::"),
    ],
)
def test_a_malformed_manifest_is_refused(damage, message, tiny_shards):
    path = tiny_shards((5, 4)) / "manifest.json"
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        load_manifest(path)
    if "address" not in message and "::" not in message and "pipe" not in message:
        assert str(path) in str(error.value) and "python -m data_pipeline index" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "5", "null", "\xff"])
def test_what_is_no_json_object_is_refused(text, tmp_path):
    path = tmp_path / "manifest.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"manifest\.json is not a manifest"):
        load_manifest(path)


def test_what_cannot_be_loaded_is_not_written(tmp_path):
    for shards in ([], [shard("a.tar", sha256="")], [shard("a.tar")] * 2, [shard("pipe:x")]):
        with pytest.raises(ValueError):
            write_manifest(tmp_path, shards, {})
    with pytest.raises(ValueError, match="local path"):
        write_manifest("s3://bucket/manifest.json", [shard("s3://bucket/a.tar")], {})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tree(tmp_path):
    for name in ("a-000.tar", "a-001.tar", "a-002.tar", "b/x.tar", "b/y.tar", "odd{1,2}[3].tar", "note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["a-{000..002}.tar"], ["a-000.tar", "a-001.tar", "a-002.tar"]),
        (["a-{002..001}.tar"], ["a-002.tar", "a-001.tar"]),
        (["a-00[12].tar"], ["a-001.tar", "a-002.tar"]),
        (["b/{y,x}.tar", "a-000.tar"], ["b/y.tar", "b/x.tar", "a-000.tar"]),
        (["**/*.tar"], ["a-000.tar", "a-001.tar", "a-002.tar", "b/x.tar", "b/y.tar", "odd{1,2}[3].tar"]),
        (["b"], ["b/x.tar", "b/y.tar"]),
        (["b", "b/*.tar", "b/x.tar"], ["b/x.tar", "b/y.tar"]),
        (["odd{1,2}[3].tar"], ["odd{1,2}[3].tar"]),
        (["{a-00?,b/*}.tar"], ["a-000.tar", "a-001.tar", "a-002.tar", "b/x.tar", "b/y.tar"]),
    ],
)
def test_patterns_stand_for_local_shards(patterns, names, tree):
    assert expand([f"{tree}/{pattern}" for pattern in patterns]) == [f"{tree}/{name}" for name in names]


@pytest.mark.parametrize("pattern", ["none.tar", "c-*.tar", "a-{000..003}.tar", "{a-000,zz}.tar", "empty"])
def test_a_pattern_that_matches_nothing_is_named(pattern, tree):
    (tree / "empty").mkdir()
    with pytest.raises(ValueError, match="no shard matches") as error:
        expand([f"{tree}/a-000.tar", f"{tree}/{pattern}"])
    assert f"{tree}/{pattern}" in str(error.value)


def test_remote_patterns():
    assert expand(["http://h/a-{08..11}.tar", "s3://b/{x,y}.tar"]) == [
        *(f"http://h/a-{number}.tar" for number in ("08", "09", "10", "11")),
        "s3://b/x.tar",
        "s3://b/y.tar",
    ]
    with pytest.raises(ValueError, match="nothing is read from ftp:"):
        expand(["ftp://h/a.tar"])


@given(st.integers(-20, 1200), st.integers(-20, 1200), st.integers(0, 5))
def test_number_ranges_as_the_shell_expands_them(first, last, width):
    """Zero padding to the longer of the two, as in bash; both directions."""
    low, high = f"{first:0{width}d}", f"{last:0{width}d}"
    names = [url.removeprefix("s3://b/x") for url in expand([f"s3://b/x{{{low}..{high}}}"])]
    step = 1 if first <= last else -1
    assert [int(name) for name in names] == list(range(first, last + step, step))
    if width > 4:
        assert {len(name) for name in names} == {width}


def test_addresses():
    for url in ("http://h/a", "https://h/a", "s3://b/a", "gs://b/a", "HTTPS://h/a"):
        assert is_remote(url)
    for path in ("/a/b.tar", "a.tar", "./odd:name.tar", "../a", "dir/a:b.tar"):
        assert not is_remote(path)
    for url in ("pipe:x", "ftp://h/a", "file:///a", "http:/h/a", "s3:b", "http://h/a::b", "PIPE:cat x"):
        with pytest.raises(ValueError):
            is_remote(url)


def test_a_tar_or_pattern_stands_for_the_manifest_beside_it(tiny_shards):
    directory = tiny_shards((5, 4))
    for pattern in ("train-{000000..000001}.tar", "*.tar"):
        assert load_manifest(directory / pattern) == load_manifest(directory)
    one = tiny_shards((5,), name="one")
    assert load_manifest(one / "train-000000.tar") == load_manifest(one)
    with pytest.raises(ValueError, match=r"is 1 tars, and the manifest beside, .* has 2"):
        load_manifest(directory / "train-000000.tar")
    (one / "manifest.json").unlink()
    with pytest.raises(ValueError, match="there is no manifest at"):
        load_manifest(one / "train-000000.tar")


def test_a_signed_address_is_read_and_its_shards_are_beside_it(tiny_shards):
    directory = tiny_shards((5,))
    with serve(directory) as server:
        manifest = load_manifest(f"{server.url}/manifest.json?X-Amz-Signature=a/b")
        assert [shard.url for shard in manifest.shards] == [f"{server.url}/train-000000.tar"]


@pytest.mark.parametrize(("name", "text"), [("captions.csv", "file,caption"), ("coco.json", '{"images": []}')])
def test_a_file_that_is_something_else_is_not_overwritten(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    (tmp_path / "a.tar").touch()
    with pytest.raises(ValueError, match="is there and is no manifest"):
        write_manifest(path, [shard(tmp_path / "a.tar")], {})
    with pytest.raises(ValueError, match=r"is not a manifest .* --out NAME\.json$"):
        load_manifest(path)
    assert path.read_text() == text


def test_the_remedy_of_a_damaged_manifest_reads_captions_as_it_did(tmp_path):
    path = tmp_path / "manifest.json"
    (tmp_path / "a.tar").touch()
    write_manifest(path, [shard(tmp_path / "a.tar")], {}, "lines")
    path.write_text(path.read_text().replace('"nsamples": 3', '"nsamples": null'))
    with pytest.raises(ValueError, match=rf"python -m data_pipeline index {tmp_path} --captions lines$"):
        load_manifest(path)
