"""Small real tokenizers, BERT's and others', written to disk as the hub has them."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import Unigram, WordPiece
from tokenizers.normalizers import BertNormalizer, Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer, Metaspace
from tokenizers.processors import TemplateProcessing
from transformers import BertTokenizerFast, CLIPTokenizer, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,."
WORDS = ("picture", "number", "of", "the", "a", "red", "heart", "drawing", "shards")


def write_tokenizer(directory: Path) -> Path:
    """Save the tokenizer to `directory`: every word of letters and digits has tokens; WORDS are one token each."""
    tokens = [*SPECIAL, *WORDS, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder()
    ends = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", ends)
    BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=512).save_pretrained(directory)
    return directory


def write_clip_tokenizer(directory: Path) -> Path:
    """Save a tokenizer of CLIP's kind: its ends of a text, which pad as well, are the last two of its tokens."""
    letters = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    vocabulary = {token: number for number, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(directory)
    return directory


def write_sentencepiece_tokenizer(directory: Path, reads_padding: bool = False) -> Path:
    """Save a tokenizer as T5's, mT5's and XLM-R's are; as SigLIP's where padding is read like other tokens."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in ("▁", *LETTERS, *WORDS))]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=2))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Metaspace()
    tokenizer.post_processor = TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    inputs = {"model_input_names": ["input_ids"]} if reads_padding else {}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", **inputs
    ).save_pretrained(directory)
    return directory
