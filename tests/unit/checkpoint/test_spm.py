"""SentencePiece models as tokenizer.json, judged by the sentencepiece library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_samples import data_folder, sentencepiece_model
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.checkpoint.limits import CheckpointError
from minitron.checkpoint.spm import differences, read_spm, tokenizer_config, tokenizer_json

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


FRAGMENTS = [
    *[
        "the",
        "quick",
        "q",
        "x",
        "fox",
        "123",
        "aaa",
        "ooo",
        "?!",
        "<extra_id_0>",
        "<extra_id_1>",
        "<extra_id_",
        "<0x0A>",
    ],
    *[" ", "  ", "\t", "\n", "\r\n", "\r", "\u2581", "\u00a0", "\u3000"],
    *["\u00e9", "e\u0301", "a\u0302\u0301", "\uff21\u0309", "\u304b\u3099", "\uff76\uff9e", "\u1112\u1161"],
    *["\u6771\u4eac", "\ud55c\uad6d", "\ufb01", "\u2460", "\uff21"],
    *["\U0001f600", "\U0001f469\u200d\U0001f469\u200d\U0001f467"],
]


def pair(path: Path) -> tuple[Any, Any]:
    """The sentencepiece library's tokenizer and ours, of one model."""
    from tokenizers import Tokenizer

    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    return oracle, Tokenizer.from_str(tokenizer_json(read_spm(path.read_bytes(), path)))


@pytest.mark.parametrize("suffix", [False, True], ids=["", "as suffix"])
@pytest.mark.parametrize("prefix", [False, True], ids=["", "prefix"])
@pytest.mark.parametrize("squeezed", [False, True], ids=["", "squeezed"])
@pytest.mark.parametrize("rule", ["identity", "nmt_nfkc"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_every_combination_of_options(
    tmp_path: Path, kind: str, rule: str, squeezed: bool, prefix: bool, suffix: bool
) -> None:
    fallback = prefix != suffix  # both values, without twice as many tests
    size = {"bpe": 420, "unigram": 330} if fallback else {"bpe": 150, "unigram": 80}
    path = sentencepiece_model(
        tmp_path,
        model_type=kind,
        vocab_size=size[kind],
        byte_fallback=fallback,
        normalization_rule_name=rule,
        remove_extra_whitespaces=squeezed,
        add_dummy_prefix=prefix,
        treat_whitespace_as_suffix=suffix,
    )
    oracle, tokenizer = pair(path)
    assert differences(read_spm(path.read_bytes(), path)) == []

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join))
    def check(text: str) -> None:
        assert tokenizer.encode(text, add_special_tokens=False).ids == oracle.encode(text)

    check()


def test_rules_of_the_user(tmp_path: Path) -> None:
    """One character to several, one to another, and one that vanishes."""
    rules = tmp_path / "rules.tsv"
    rules.write_text("00FC\t0075 0065\n0061\t0078\n0071\t\n")
    path = sentencepiece_model(tmp_path, normalization_rule_tsv=str(rules), normalization_rule_name="")
    oracle, tokenizer = pair(path)
    for text in ("f\u00fcr", "\u00fc\u0301", "quick\r\nq", "the \u00fc", "u\u0308"):
        assert tokenizer.encode(text, add_special_tokens=False).ids == oracle.encode(text), text


def test_rules_for_several_characters_are_said_to_differ(tmp_path: Path) -> None:
    rules = tmp_path / "rules.tsv"
    rules.write_text("0074 0068\t0078\n")
    path = sentencepiece_model(tmp_path, normalization_rule_tsv=str(rules), normalization_rule_name="")
    oracle, tokenizer = pair(path)
    assert tokenizer.encode("the").ids != oracle.encode("the")
    assert any("several characters" in found for found in differences(read_spm(path.read_bytes(), path)))


def edited(path: Path, **changes: Any) -> Path:
    """The model with other settings, which no trainer has an option for."""
    model_pb2 = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    proto = model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    for name, value in changes.items():
        if name == "kind":
            proto.pieces[value[0]].type = value[1]
        elif name == "score":
            for piece in proto.pieces:
                piece.score = value
        else:
            setattr(proto.normalizer_spec, name, value)
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.mark.parametrize("squeezed", [False, True])
def test_spaces_that_are_not_marked(tmp_path: Path, squeezed: bool) -> None:
    path = sentencepiece_model(tmp_path, byte_fallback=True)
    oracle, tokenizer = pair(edited(path, escape_whitespaces=False, remove_extra_whitespaces=squeezed))
    for text in [*TEXTS, "", " ", "<extra_id_0> a", "a\u2581 "]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == oracle.encode(text), text


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kind": (400, 5)}, "is marked as unused"),
        ({"score": 0.0}, "several pieces have the same score"),
    ],
)
def test_what_differs_is_said(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    path = edited(sentencepiece_model(tmp_path), **changes)
    assert any(sentence in found for found in differences(read_spm(path.read_bytes(), path)))


def test_a_symbol_that_the_normalization_changes(tmp_path: Path) -> None:
    options = {"normalization_rule_name": "nfkc", "user_defined_symbols": ["\u2460tag"]}
    path = sentencepiece_model(tmp_path, **options)
    oracle, tokenizer = pair(path)
    assert tokenizer.encode("\u2460tag").ids != oracle.encode("\u2460tag")
    assert any("tag" in found and "normalization" in found for found in differences(read_spm(path.read_bytes(), path)))


def test_random_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = sentencepiece_model(tmp_path)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = Tokenizer.from_str(tokenizer_json(read_spm(path.read_bytes(), path)))

    # SentencePiece cuts text at a NUL.
    alphabet = st.characters(exclude_categories=("Cs",), exclude_characters="\0")

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
