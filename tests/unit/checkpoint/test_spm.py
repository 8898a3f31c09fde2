"""SentencePiece models as tokenizer.json, judged by the sentencepiece library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_samples import data_folder, sentencepiece_model
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.spm import read_spm, tokenizer_config, tokenizer_json

sentencepiece = pytest.importorskip("sentencepiece")

TEXTS = [
    "the quick brown fox",
    " two  spaces   inside and one before",
    "trailing ",
    "Zürich, 東京 and \U0001f600 fall back to bytes",
    "tabs\tand\nnew lines\n\n",
    "a",
    "the<extra_id_1>User\nwizards quietly<extra_id_1>Assistant\n",
    "numbers 12345 and punctuation: (a, b); 'c'!",
]
VARIANTS = {
    "nemotron": {},
    "nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "squeezed": {"remove_extra_whitespaces": True},
    "no prefix": {"add_dummy_prefix": False},
    "unigram": {"model_type": "unigram", "vocab_size": 330},
    "no bytes": {"byte_fallback": False, "vocab_size": 150},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_ids_and_text_as_sentencepiece(tmp_path: Path, variant: str) -> None:
    from tokenizers import Tokenizer

    path = sentencepiece_model(tmp_path, **VARIANTS[variant])
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer.from_str(tokenizer_json(read_spm(path.read_bytes(), path)))
    assert tokenizer.get_vocab_size() == oracle.get_piece_size()
    assert all(tokenizer.id_to_token(i) == oracle.id_to_piece(i) for i in range(oracle.get_piece_size()))
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == oracle.encode(text), text
        if oracle.unk_id() not in ids:
            assert tokenizer.decode(ids, skip_special_tokens=False) == oracle.decode(ids), text


def test_random_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = sentencepiece_model(tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer.from_str(tokenizer_json(read_spm(path.read_bytes(), path)))

    # SentencePiece cuts text at a NUL and treats its own space mark as a space; neither is text.
    alphabet = st.characters(exclude_categories=("Cs",), exclude_characters="\0\u2581")

    @settings(max_examples=200, deadline=None)
    @given(st.text(alphabet))
    def check(text: str) -> None:
        assert tokenizer.encode(text, add_special_tokens=False).ids == oracle.encode(text)

    check()


def test_stories_tokenizer_of_others() -> None:
    from tokenizers import Tokenizer

    folder = data_folder()
    if folder is None:
        pytest.skip("the data folder is not at hand (MINITRON_DATA)")
    path = folder / "tokenizers" / "tinystories_pranavnt_spm.model"
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer.from_str(tokenizer_json(read_spm(path.read_bytes(), path)))
    text = (folder / "wikitext2" / "valid.txt").read_text()[:20_000]
    # Hugging Face tokenizers find special tokens in plain text, SentencePiece does not.
    text = text.replace("<unk>", "unk")
    for line in text.splitlines():
        assert tokenizer.encode(line, add_special_tokens=False).ids == oracle.encode(line)


def test_tokenizer_loads_with_an_attention_mask(tmp_path: Path) -> None:
    """Bug (g) of the 4.46 script: token types instead of an attention mask."""
    from transformers import AutoTokenizer

    model = read_spm(sentencepiece_model(tmp_path).read_bytes(), "spm")
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer_json(model))
    (folder / "tokenizer_config.json").write_text(tokenizer_config(model, 4096))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["the fox", "a lazy dog jumps"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    ids = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert ids == [0, 1, 2, 3]
    assert batch["attention_mask"][0][-1] == 0
    assert json.loads(tokenizer_config(model, 4096))["model_max_length"] == 4096


@pytest.mark.parametrize("data", [b"", b"\xff" * 30, b"\x0a\x7f", b"PK\x03\x04" * 9])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="SentencePiece"):
        read_spm(data, "junk")
