"""Texts as tokens: pairs keep their border, nothing is longer than asked, and serving encodes as training does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from text_checkpoint import save_byte_tokenizer
from tokenizers import processors
from verb_calls import call

from minitron import NemotronConfig, NemotronForCausalLM
from minitron.assets import bundled_model
from minitron.cli.finetune import finetune
from minitron.cli.predict import predict
from minitron.serve.classifiers import load_classifier
from minitron.serve.errors import ApiError
from minitron.tokenizer import load_tokenizer
from minitron.tune.encoding import LabelError, encode_texts, encoder_of, is_padding, pair_separator

TEXTS = st.text("abc \n", max_size=12)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of bytes, without a template for pairs."""
    folder = tmp_path_factory.mktemp("bytes")
    save_byte_tokenizer(folder)
    return load_tokenizer(folder)


@given(one=st.tuples(TEXTS, TEXTS), two=st.tuples(TEXTS, TEXTS))
def test_other_pairs_are_other_tokens(tokenizer: Any, one: tuple[str, str], two: tuple[str, str]) -> None:
    separator = pair_separator(tokenizer)
    found = encode_texts(tokenizer, [one, two], 64, separator)
    assert (found[0] == found[1]) == (one == two)
    assert found == [encode_texts(tokenizer, [each], 64, separator)[0] for each in (one, two)]


def test_without_a_separator_the_border_was_lost_as_it_still_is_for_old_models(tokenizer: Any) -> None:
    old = encoder_of(SimpleNamespace(text_format="plain"))
    one, two = old(tokenizer, [("ab", "c"), ("a", "bc")], 64)
    assert one == two == tokenizer("ab", "c")["input_ids"]


def test_the_separator_is_the_tokenizers_own_where_it_has_one(tmp_path: Path, tokenizer: Any) -> None:
    assert pair_separator(tokenizer) == "</s>"
    bundled = load_tokenizer(bundled_model("half"))
    one, two = encode_texts(bundled, [("ab", "c"), ("a", "bc")], 64, pair_separator(bundled))
    assert one != two
    save_byte_tokenizer(tmp_path)
    mine: Any = load_tokenizer(tmp_path)
    mine.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    assert pair_separator(mine) is None
    mine.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    assert pair_separator(mine) == "</s>"
    assert encode_texts(mine, [("a", "b")], 9, "</s>") == [
        [1, *mine("a")["input_ids"][1:], 2, *mine("b")["input_ids"][1:]]
    ]
    mine.eos_token = None
    assert pair_separator(mine) == "\n"


@given(one=st.text("ab", max_size=20), two=st.text("cd", max_size=20), most=st.integers(3, 30))
def test_both_texts_are_cut_the_longer_one_first(tokenizer: Any, one: str, two: str, most: int) -> None:
    [ids] = encode_texts(tokenizer, [(one, two)], most, "</s>")
    theirs = tokenizer(one, two, truncation=True, max_length=max(1, most - bool(two)))["input_ids"]
    assert len(ids) == len(theirs) + bool(two)
    if two:
        before, after = ids[: ids.index(2)], ids[ids.index(2) + 1 :]
        assert one.startswith(tokenizer.decode(before))
        assert two.startswith(tokenizer.decode(after))
        assert bool(before) == bool(one)
        assert after
        if len(before) < len(one) and len(after) < len(two):
            assert 0 <= len(before) - len(after) <= 1


def test_a_text_of_padding_is_told_from_one_that_has_some(tokenizer: Any) -> None:
    found = [is_padding(tokenizer, text) for text in ("<pad>", " <pad> <pad>\n", "<pad>a", "", "pad")]
    assert found == [True, True, False, False, False]


def test_a_pair_needs_room(tokenizer: Any) -> None:
    with pytest.raises(LabelError, match="2 tokens leave no room for two texts; the tokens around them are 1"):
        encode_texts(tokenizer, [("a", "b")], 2, "</s>")


def test_pairs_are_read_as_they_were_learned(tmp_path: Path) -> None:
    """The label is whether both texts are the same; in every row both together are the same letters."""
    save_byte_tokenizer(tmp_path / "base")
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=len(load_tokenizer(tmp_path / "base")), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=48,
    )  # fmt: skip
    NemotronForCausalLM(config).save_pretrained(tmp_path / "base")
    rows = [
        {"text": f"{'a' * (i % 5 + 1)}", "pair": f"{'a' * (5 - i % 5)}", "label": "xy"[i % 5 == 2]} for i in range(40)
    ]
    rows = [{**row, "text": f"{number} {row['text']}"} for number, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--task", "classify", "--data", tmp_path / "rows.jsonl", "--steps", "2", "--out", tmp_path / "run"]
    code, _, err = call(finetune, tmp_path / "base", *options, "--dtype", "fp32", "--preview")
    assert code == 0, err
    assert "note: '</s>' stands between the texts of a pair" in err
    assert " aaaa</s>aa" in err or " aaa</s>aaa" in err or " aa</s>aaaa" in err
    code, _, err = call(finetune, tmp_path / "base", *options, "--dtype", "fp32")
    assert code == 0, err
    model = tmp_path / "run" / "model"
    assert json.loads((model / "config.json").read_text())["pair_separator"] == "</s>"
    code, _, err = call(predict, model, tmp_path / "rows.jsonl", "--out", tmp_path / "out.jsonl")
    assert code == 0, err
    found = [json.loads(line)["probabilities"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    served: Any = load_classifier("judge", str(model), "cpu", lambda _: None)
    tokenizer = load_tokenizer(model)
    for row, shares in list(zip(rows, found, strict=True))[:8]:
        ids = tokenizer(f"{row['text']}</s>{row['pair']}", return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = served.model(input_ids=ids).logits[0].softmax(-1).tolist()
        assert list(shares.values()) == pytest.approx(expected, abs=2e-6)
        judged, count = served.judge(0, row["text"], None, row["pair"])
        assert judged["probs"] == pytest.approx(expected, abs=1e-6)
        assert count == ids.shape[1]
    check_calibration(served)


def check_calibration(served: Any) -> None:
    """The stored temperature divides the logits on demand, and is missed where there is none."""
    served.model.config.label_temperature = 4.0
    plain, calibrated = (served.judge(0, "aaa", None, "aa", wanted)[0]["probs"] for wanted in (False, True))
    odds = [torch.tensor(shares).log().diff().item() for shares in (plain, calibrated)]
    assert odds[1] == pytest.approx(odds[0] / 4, rel=1e-3)
    del served.model.config.label_temperature
    with pytest.raises(ApiError, match="judge: label_temperature is None; calibrated probabilities need"):
        served.judge(0, "aaa", None, "aa", True)
    with pytest.raises(ApiError, match="input 3 has no tokens but padding"):
        served.judge(3, "<pad><pad>", None)
    with pytest.raises(ApiError, match="takes no question"):
        served.judge(0, "a", "b")
