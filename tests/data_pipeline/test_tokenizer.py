"""Token ids against the tokenizer itself; padding by the longest of the batch."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertTokenizerFast

from data_pipeline.tokenizer import Tokenizer
from tests.support.vocabulary import LETTERS, SPECIAL, WORDS, write_tokenizer

ROOT = Path(__file__).parents[2]
LOAD = """
import sys
from data_pipeline.tokenizer import Tokenizer
from train.config import TextTowerConfig
from train.model.text import TextTower

for load in (
    lambda: Tokenizer(sys.argv[1], 8),
    lambda: TextTower(TextTowerConfig(name=sys.argv[1])),
    lambda: TextTower(TextTowerConfig(name=sys.argv[1], weights="scratch")),
):
    try:
        load()
    except ValueError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_ids_are_those_of_the_tokenizer_itself(directory: Path) -> None:
    captions = ["A red heart", "number 42 of the drawing", "unknown: 心"]
    ids_BL, mask_BL = Tokenizer(str(directory), 77)(captions)
    plain = AutoTokenizer.from_pretrained(directory)
    assert ids_BL.dtype == mask_BL.dtype == torch.int64
    for caption, ids_L, mask_L in zip(captions, ids_BL, mask_BL, strict=True):
        expected = plain(caption)["input_ids"]
        assert ids_L[mask_L.bool()].tolist() == expected
        assert mask_L.tolist() == [1] * len(expected) + [0] * (len(ids_L) - len(expected))
        assert ids_L[len(expected) :].eq(plain.pad_token_id).all()
    assert plain.unk_token_id in ids_BL[2] and plain.unk_token_id not in ids_BL[0]


@pytest.mark.parametrize(
    ("words", "max_tokens", "length"),
    [(1, 77, 8), (6, 77, 8), (7, 77, 16), (70, 77, 72), (71, 77, 77), (500, 77, 77), (500, 12, 12)],
)
def test_length_is_the_longest_rounded_up_to_8(directory: Path, words: int, max_tokens: int, length: int) -> None:
    ids_BL, mask_BL = Tokenizer(str(directory), max_tokens)(["heart", "red " * words])
    assert ids_BL.shape == mask_BL.shape == (2, length)
    assert mask_BL.sum(1).tolist() == [3, min(words + 2, max_tokens)]
    last = int(mask_BL[1].sum()) - 1
    assert ids_BL[1, last] == SPECIAL.index("[SEP]"), "a cut caption still ends in its separator"


def test_no_captions_make_no_rows(directory: Path) -> None:
    ids_BL, mask_BL = Tokenizer(str(directory), 77)([])
    assert ids_BL.shape == mask_BL.shape == (0, 8)


def test_vocabulary_size_and_pickling(directory: Path) -> None:
    tokenizer = Tokenizer(str(directory), 77)
    assert tokenizer.vocab_size == len(SPECIAL) + len({*WORDS, *LETTERS}) + len(LETTERS)
    again = pickle.loads(pickle.dumps(tokenizer))
    assert torch.equal(again(["a red heart"])[0], tokenizer(["a red heart"])[0])


def test_a_vocabulary_of_special_tokens_alone_is_refused(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]))
    BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"^model\.text\.tokenizer .*empty.* only the special tokens"):
        Tokenizer(str(tmp_path / "empty"), 77)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.text\.tokenizer .* this directory .*tokenizer\.json"):
        Tokenizer(str(tmp_path), 77)


def test_a_hub_name_without_network_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^model\.text\.tokenizer nobody/nothing .*local directory"):
        Tokenizer("nobody/nothing", 77)


def test_too_few_tokens_are_refused(directory: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.max_tokens is 2: at least 3"):
        Tokenizer(str(directory), 2)


def test_its_files_make_it_again_wherever_it_came_from(directory: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer(str(directory), 77)
    tokenizer(["a caption, whose truncation the tokenizer keeps"])
    for name, content in tokenizer.files().items():
        assert str(directory).encode() not in content
        (tmp_path / name).write_bytes(content)
    again = Tokenizer(str(tmp_path), 77)
    assert again.identity() == tokenizer.identity()
    assert torch.equal(again(["a red heart"])[0], tokenizer(["a red heart"])[0])
    assert again.files() == tokenizer.files()


def test_case_17_code_beside_a_model_is_never_run_whatever_the_terminal_says(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "own.py").write_text(f"open({str(canary)!r}, 'w')")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], cwd=ROOT, input="y\n" * 9, text=True, capture_output=True
    )
    assert not canary.exists()
    assert done.stdout.count("needs code of its own, which is never run") == 3, done.stderr
