"""`python -m train.search`: what it finds, the page it writes, and what it refuses."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.embeddings.index import Index
from data_pipeline.embeddings.nearest import Searcher, nearest
from data_pipeline.storage.manifest import load_manifest
from tests.support.small import write_data
from tests.support.tars import contents
from train import embed, search
from train.export.source import load_source


def vectors(count: int, dims: int = 8, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((count, dims)).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_the_nearest_are_those_of_a_full_sort_however_the_vectors_are_cut(monkeypatch):
    vectors_ND, query_QD = vectors(1000), vectors(3, seed=1)
    vectors_ND[700] = vectors_ND[12]
    wanted_QT = np.argsort(-(query_QD @ vectors_ND.T), axis=1, kind="stable")
    for chunk in (7, 400, 5000):
        monkeypatch.setattr("data_pipeline.embeddings.nearest.CHUNK", chunk)
        scores_QT, rows_QT = nearest(vectors_ND, query_QD, 20)
        assert np.array_equal(rows_QT, wanted_QT[:, :20])
        assert np.allclose(scores_QT, np.take_along_axis(query_QD @ vectors_ND.T, rows_QT, 1))
    assert nearest(vectors_ND[:3], query_QD, 20)[1].shape == (3, 3)
    assert nearest(vectors_ND, vectors_ND[12:13], 2)[1].tolist() == [[12, 700]], "ties to the earlier one"


@pytest.mark.skipif(not importlib.util.find_spec("faiss"), reason="faiss is not installed")
def test_above_the_limit_faiss_finds_the_same_and_keeps_its_index(tmp_path: Path):
    vectors_ND = vectors(5000, 16)
    np.save(tmp_path / "images.npy", vectors_ND)
    index = Index(tmp_path, {"images": 5000, "dims": 16})
    searcher = Searcher(index, "images", exact_up_to=1000)
    assert searcher.how.startswith("by faiss")
    (scores_T,), (rows_T,) = searcher(vectors_ND[42:43], 5)
    assert rows_T[0] == 42 and scores_T[0] == pytest.approx(1)
    query_QD = vectors(50, 16, seed=1)
    wanted_QT, found_QT = nearest(vectors_ND, query_QD, 10)[1], searcher(query_QD, 10)[1]
    assert np.mean([len(set(a) & set(b)) for a, b in zip(wanted_QT, found_QT, strict=True)]) > 7
    written = (tmp_path / "images.faiss").stat().st_mtime_ns
    assert np.array_equal(Searcher(index, "images", 1000)(vectors_ND[:3], 5)[1], searcher(vectors_ND[:3], 5)[1])
    assert (tmp_path / "images.faiss").stat().st_mtime_ns == written


def test_without_faiss_a_large_index_is_searched_exactly_and_that_is_said(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    np.save(tmp_path / "images.npy", vectors(50))
    searcher = Searcher(Index(tmp_path, {"images": 50, "dims": 8}), "images", exact_up_to=10)
    assert searcher.how == "exact; above 10 vectors faster with: pip install faiss-cpu"
    assert searcher(vectors(50)[7:8], 1)[1].tolist() == [[7]]


def test_a_text_and_an_image_find_their_nearest_with_captions(index: Index, run, data, tmp_path: Path, capsys):
    shard = load_manifest(data).shards[1]
    key, members = contents(shard.url, shard)[2]
    (tmp_path / "query.png").write_bytes(members["png"])
    page = tmp_path / "new" / "page.html"
    command = ["--index", str(index.directory), "--top", "3"]
    assert search.main([*command, "--json", "--page", str(page), "the blue picture", str(tmp_path / "query.png")]) == 0
    text, image = json.loads(capsys.readouterr().out)["answers"]

    query_1D = load_source(run).model.encode_text(*load_source(run).tokenizer(["the blue picture"])).detach().numpy()
    wanted = np.argsort(-(index.image_ND @ query_1D[0]))[:3]
    keys = index.rows("images")["key"].to_pylist()
    assert [hit["key"] for hit in text["hits"]] == [keys[row] for row in wanted]
    first = image["hits"][0]
    assert first["key"] == f"part-000001.tar/{key}" and first["score"] > 0.999 and first["rank"] == 1
    assert first["text"] == "; ".join(json.loads(members["json"])["captions"])

    html = page.read_text()
    assert html.count('src="data:image/webp;base64,') == 7 and "the blue picture" in html
    assert "class=blank" not in html
    assert not re.search(r"(src|href)=\"?http", html)

    assert search.main([*command, "--among", "texts", "the blue picture"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "picture" in lines[1] and lines[1].lstrip().startswith("1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--index", "{tmp}", "x"], "--index .*: there is no index.json in it; make it with"),
        (["--index", "{empty}", "x"], "--index .* is empty: not one sample"),
        (["--index", "{index}", "--model", "{run}", "--step", "1", "x"], "is of another model, .*: leave out --model"),
        (["--index", "{index}", "--model", "nowhere", "x"], "--model nowhere: there is no such directory"),
        (["--index", "{index}", "--top", "0", "x"], "--top 0: give 1 or more"),
        (["--index", "{index}", " "], "QUERY is empty"),
        (["--index", "{index}", "gone.JPG"], "QUERY gone.JPG: there is no such file"),
        (["--index", "{index}", "{index}/index.json"], "QUERY .*: not a JPEG, PNG or WebP image but JSON"),
        (["--index", "{texts}", "--among", "images", "x"], "--among images: index .* has none, only texts"),
    ],
)
def test_what_cannot_be_searched_is_refused(index, run, tmp_path, capsys, arguments, message):
    names = {"tmp": tmp_path, "index": index.directory, "run": run}
    names |= {"empty": tmp_path / "empty", "texts": tmp_path / "t"}
    if "{empty}" in arguments:
        bad = write_data(tmp_path / "bad", (1,), bad=(0,))
        embed.main(["--model", str(run), "--workers", "0", str(bad), str(names["empty"])])
    if "{texts}" in arguments:
        (tmp_path / "list.txt").write_text("one")
        assert embed.main(["--model", str(run), str(tmp_path / "list.txt"), str(names["texts"])]) == 0
    assert search.main([argument.format(**names) for argument in arguments]) == 2
    assert re.search(message, capsys.readouterr().err)
