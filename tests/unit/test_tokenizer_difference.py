"""Whether two tokenizers can stand for each other."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import minitron
from minitron.tokenizer import load_tokenizer, tokenizer_difference


@pytest.fixture(scope="module")
def rules() -> dict[str, Any]:
    return json.loads((minitron.bundled_model() / "tokenizer.json").read_text(encoding="utf-8"))


def made(rules: dict[str, Any], **special: str) -> PreTrainedTokenizerFast:
    raw = Tokenizer.from_str(json.dumps(rules))
    return PreTrainedTokenizerFast(tokenizer_object=raw, **{"bos_token": "<s>", "eos_token": "</s>", **special})


def test_equal_tokenizers(rules: dict[str, Any], tmp_path: Path) -> None:
    ours = load_tokenizer(minitron.bundled_model())
    assert tokenizer_difference(ours, made(rules)) is None
    ours.save_pretrained(tmp_path)
    assert tokenizer_difference(ours, load_tokenizer(tmp_path)) is None
    # Rules written in another way, for the same ids: a normalizer that changes nothing in any of the texts.
    assert tokenizer_difference(ours, made(rules | {"normalizer": {"type": "Sequence", "normalizers": []}})) is None
    assert tokenizer_difference(ours, made(rules | {"post_processor": None, "decoder": None})) is None


def test_differences(rules: dict[str, Any]) -> None:
    ours = made(rules)
    merges = rules["model"]["merges"]
    model = rules["model"]
    swapped = dict(model["vocab"], **{"a": model["vocab"]["b"], "b": model["vocab"]["a"]})
    for theirs, says in (
        (made(rules | {"model": model | {"vocab": swapped}}), "token 'a' is"),
        (made(rules, bos_token="</s>"), "bos_token_id is 2 in the first and 3 in the second"),
        (made(rules, eos_token="<unk>"), "eos_token_id is 3 in the first and 1 in the second"),
        (made(rules | {"model": model | {"merges": merges[:-1]}}), "different tokens"),
        (made(rules | {"model": model | {"merges": merges[::-1]}}), "different tokens"),
        (made(rules | {"normalizer": {"type": "NFC"}}), "different tokens"),
        (made(rules | {"normalizer": {"type": "Lowercase"}}), "different tokens"),
        (made(rules | {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}), "different tokens"),
        (
            made(rules | {"normalizer": {"type": "Replace", "pattern": {"String": "\r\n"}, "content": "\n"}}),
            "different",
        ),
    ):
        for found in (tokenizer_difference(ours, theirs), tokenizer_difference(theirs, ours)):
            assert found is not None
        assert says in str(tokenizer_difference(ours, theirs))
    # A difference that none of the fixed texts shows, in a text that is compared.
    replaced = {"type": "Replace", "pattern": {"String": "Zyzzyva Lane"}, "content": "Zyzzyva"}
    theirs = made(rules | {"normalizer": replaced})
    assert tokenizer_difference(ours, theirs) is None
    assert "Zyzzyva Lane" in str(tokenizer_difference(ours, theirs, ["Zyzzyva Lane"]))


def test_unigram_models_of_other_scores() -> None:
    """The same vocabulary and the same text of each token; words are cut at other places."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -9.0) for letter in string.printable)]

    def unigram(th: float, he: float) -> PreTrainedTokenizerFast:
        raw = Tokenizer(models.Unigram([*pieces, ("th", th), ("he", he)], unk_id=0))
        return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")

    assert tokenizer_difference(unigram(-2.0, -3.0), unigram(-2.0, -3.0)) is None
    assert tokenizer_difference(unigram(-2.0, -3.0), unigram(-2.0, -4.0)) is None
    assert "different tokens" in str(tokenizer_difference(unigram(-2.0, -3.0), unigram(-3.0, -2.0)))
