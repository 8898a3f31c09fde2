"""Answers within texts: windows and positions, the loss, the best span, SQuAD's scores, and the whole way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_checkpoint import save_byte_tokenizer
from verb_calls import call

from minitron import NemotronConfig, NemotronForCausalLM
from minitron.cli.finetune import finetune
from minitron.cli.predict import predict
from minitron.data.annotated import Question
from minitron.data.examples import Examples
from minitron.heads import NemotronForQuestionAnswering
from minitron.tokenizer import load_tokenizer
from minitron.tune.answer_scores import answer_scores, exact_match, normalized, sentence_baseline, word_f1
from minitron.tune.answers import SpanLoss, _best, answer_rows, answer_windows, predict_spans
from minitron.tune.rows import Row, RowStream, pad_rows

CONTEXT = "Ada King was born in London in 1815, the only child of the poet Byron who counted in wedlock."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return load_tokenizer(folder)


def asked(answer: str | None, context: str = CONTEXT) -> Question:
    return Question(context, "Where?", (answer,) if answer else (), context.index(answer) if answer else None)


def examples_of(*items: Question) -> Examples[Question]:
    return Examples(list(items), [f"row {i + 1}" for i in range(len(items))])


@settings(max_examples=50, deadline=None)
@given(st.text("abé😀 .", min_size=1, max_size=120), st.integers(20, 60), st.data())
def test_an_answer_is_whole_in_a_window_and_its_tokens_spell_it(tokenizer, context: str, most: int, data) -> None:
    first = data.draw(st.integers(0, len(context) - 1))
    stop = data.draw(st.integers(first + 1, min(len(context), first + 2)))
    item = Question(context, "q", (context[first:stop],), first)
    (mine,) = answer_windows(tokenizer, [item], most)
    rows = answer_rows(tokenizer, examples_of(item), most)
    assert len(rows) == len(mine)
    found = 0
    for window, row in zip(mine, rows, strict=True):
        assert len(row.ids) <= most
        start, end = row.targets["start"], row.targets["end"]
        if start == window.nowhere:
            assert end == start
            continue
        found += 1
        inside = window.offsets[start - window.first : end - window.first + 1]
        assert context[inside[0][0] : inside[-1][1]] == context[first:stop]
    assert found or 4 * (stop - first) > (most - 3) // 3  # an answer that is longer than the overlap may be cut


def test_a_text_without_the_answer_points_at_the_last_token(tokenizer) -> None:
    (row,) = answer_rows(tokenizer, examples_of(asked(None)), 200)
    assert row.targets == {"start": len(row.ids) - 1, "end": len(row.ids) - 1}


def test_the_loss_is_that_of_the_head_however_a_step_is_cut() -> None:
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = NemotronForQuestionAnswering(config).double().eval()
    rows = [Row(tuple(range(1, 9)), {"start": s, "end": s + 2}) for s in (1, 4, 5)]
    batch = pad_rows(rows, 0)
    theirs = model(
        input_ids=batch.input_ids, start_positions=batch.targets["start"], end_positions=batch.targets["end"]
    ).loss
    stream = RowStream(rows, 0, seed=0, sequence=64)
    cut = sum(SpanLoss()(model, part)[0] for part in stream.batches(0, 3, 2))
    torch.testing.assert_close(torch.as_tensor(cut).double(), theirs.double(), rtol=1e-6, atol=1e-7)
    # Padding is no place for an answer: a longer neighbour changes nothing.
    mixed = [*rows, Row(tuple(range(1, 30)), {"start": 20, "end": 21})]
    together = SpanLoss()(model, pad_rows(mixed, 0))[0] * 4
    apart = SpanLoss()(model, batch)[0] * 3 + SpanLoss()(model, pad_rows(mixed[3:], 0))[0]
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-7)


def test_the_best_span_is_the_best_of_all(tokenizer) -> None:
    (windows,) = answer_windows(tokenizer, [asked("London")], 60)
    assert len(windows) > 1
    generator = np.random.default_rng(0)
    for _ in range(20):
        scored = [(w, (generator.normal(size=len(w.ids)), generator.normal(size=len(w.ids)))) for w in windows]
        every = [
            (starts[w.first + a] + ends[w.first + b], w.offsets[a][0], w.offsets[b][1])
            for w, (starts, ends) in scored
            for a in range(len(w.offsets))
            for b in range(a, min(len(w.offsets), a + 48))
        ]
        best, first, stop = max(every)
        nowhere = min(s[w.nowhere] + e[w.nowhere] for w, (s, e) in scored)
        found = _best(CONTEXT, scored, no_answer=False)
        assert found.text == CONTEXT[first:stop].strip()
        assert found.score == pytest.approx(np.exp(best) / sum(np.exp(each[0]) for each in every))
        found = _best(CONTEXT, scored, no_answer=True)
        assert found.text == ("" if nowhere >= best else CONTEXT[first:stop].strip())


@pytest.mark.parametrize(
    ("answer", "truth", "exact", "f1"),
    [
        # By hand, after the definitions of SQuAD's evaluate-v2.0.py.
        ("The London!", "london", 1, 1),
        ("in London", "London", 0, 2 / 3),
        ("New York York", "York", 0, 0.5),
        ("", "", 1, 1),
        ("", "London", 0, 0),
        ("the", "", 1, 1),
        ("Paris", "London", 0, 0),
        ("U.S.", "US", 1, 1),
        ("well-known", "well known", 0, 0),
    ],
)
def test_scores_of_one_answer(answer: str, truth: str, exact: float, f1: float) -> None:
    assert exact_match(answer, truth) == exact
    assert word_f1(answer, truth) == pytest.approx(f1)
    assert normalized(" An  apple ") == "apple"


def test_scores_take_the_answer_that_fits_best() -> None:
    items = [Question("c", "q", ("London", "in London"), 0), Question("c", "q", (), None)]
    assert answer_scores(["in london", ""], items) == {
        "exact_match": 1.0, "f1": 1.0, "f1_answered": 1.0, "f1_unanswered": 1.0
    }  # fmt: skip
    assert answer_scores(["in london", "x"], items)["f1_unanswered"] == 0.0
    text = "Ada was born in London. She counted in Turin."
    assert sentence_baseline([Question(text, "Where was Ada born?", ("London",), 16)])["f1"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("unanswered", [False, True])
def test_from_questions_to_answers(tokenizer, tmp_path: Path, unanswered: bool) -> None:
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=48,
    )  # fmt: skip
    NemotronForCausalLM(config).save_pretrained(tmp_path / "base")
    rows = []
    for i in range(120):
        none = unanswered and i % 3 == 0
        context = f"{'ab'[i % 2] * (1 + i % 5)} {'' if none else 'X'}{'cd'[i % 2] * (1 + i % 3)}"
        rows.append({"context": context, "question": "?", "answers": [] if none else ["X"]})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["--data", file, "--validation", file, "--test", file]
    options = ["--task", "qa", *data, "--lr", "1e-2", "--epochs", "4", "--batch", "8", "--dtype", "fp32"]
    code, out, err = call(finetune, tmp_path / "base", *options, "--out", tmp_path / "run")
    assert code == 0, err
    assert "[[no answer]]" in err if unanswered else "[[X]]" in err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["scores"]["model"]["exact_match"] > 0.9, out
    file.write_text('{"context": "aa Xcc", "question": "?"}\n{"context": "aa cc", "question": "?"}\n')
    code, _, err = call(predict, tmp_path / "run" / "model", file, "--out", tmp_path / "o.jsonl")
    assert code == 0, err
    found = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert found[0]["answer"] == "X"
    assert found[0]["start"] == 3
    assert (found[1]["answer"] == "") == unanswered


def test_neither_neighbours_nor_padding_change_an_answer(tokenizer) -> None:
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    model = NemotronForQuestionAnswering(config).double().eval()
    items = [asked("London"), asked(None, "short"), asked(None, CONTEXT * 2)]
    together = predict_spans(model, tokenizer, items, 0, 48, no_answer=True)
    for item, span in zip(items, together, strict=True):
        (alone,) = predict_spans(model, tokenizer, [item], 0, 48, no_answer=True, at_once=1)
        assert (alone.text, alone.start) == (span.text, span.start)
        assert alone.score == pytest.approx(span.score, rel=1e-6)
