"""Names: words and their tokens, the loss, the best tags, scores against seqeval, and the whole way by commands."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score, precision_score, recall_score
from seqeval.scheme import IOB2
from text_checkpoint import save_byte_tokenizer
from verb_calls import call

from minitron import NemotronConfig, NemotronForCausalLM
from minitron.cli.finetune import finetune
from minitron.cli.predict import predict
from minitron.data.annotated import Tagged, tagged
from minitron.data.examples import Examples
from minitron.heads import NemotronForTokenClassification
from minitron.ops.loss import IGNORE_INDEX
from minitron.tokenizer import load_tokenizer
from minitron.tune.labels import LabelError
from minitron.tune.name_scores import by_type, gazetteer, name_scores
from minitron.tune.names import TagSet, TokenLoss, best_path, name_rows, predict_tags, windows
from minitron.tune.rows import Row, RowStream, pad_rows

TAGS = TagSet(("LOC", "PER"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_byte_tokenizer(folder)
    return load_tokenizer(folder)


def sentence(words: list[str], tags: list[str] | None = None) -> Tagged:
    found = tagged()({"words": words, "tags": tags or ["O"] * len(words)})
    assert isinstance(found, Tagged)
    return found


def examples_of(*items: Tagged) -> Examples[Tagged]:
    return Examples(list(items), [f"a.conll, line {i + 1}" for i in range(len(items))])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("abé😀", min_size=1, max_size=9), min_size=1, max_size=30),
    st.integers(14, 40),
)
def test_every_word_is_read_once_at_the_token_of_its_last_character(tokenizer, words: list[str], most: int) -> None:
    item = sentence(words)
    (mine,) = windows(tokenizer, [item], most)
    seen = [word for window in mine for word, _ in window.words]
    assert seen == list(range(len(words)))
    for window in mine:
        assert len(window.ids) <= most
        for word, token in window.words:
            text = tokenizer.decode(window.ids[: token + 1], skip_special_tokens=True)
            assert text[-1] == words[word][-1]


def test_labels_stand_at_last_tokens_and_nowhere_else(tokenizer) -> None:
    item = sentence(["Ada", "King", "sat"], ["B-PER", "I-PER", "O"])
    (row,), notes = name_rows(tokenizer, examples_of(item), TAGS, 64)
    assert not notes
    assert row.token_labels is not None
    labelled = [(i, label) for i, label in enumerate(row.token_labels) if label != IGNORE_INDEX]
    assert [label for _, label in labelled] == [TAGS.names.index(tag) for tag in ("B-PER", "I-PER", "O")]
    ends = [tokenizer.decode(row.ids[: i + 1], skip_special_tokens=True) for i, _ in labelled]
    assert ends == ["Ada", "Ada King", "Ada King sat"]


def test_tag_sets() -> None:
    one = sentence(["Ada", "in", "York"], ["B-PER", "O", "B-LOC"])
    assert TagSet.of(examples_of(one, one)) == TAGS
    assert TAGS.names == ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
    assert TagSet.of_config(NemotronConfig(**TAGS.config())) == TAGS
    with pytest.raises(LabelError, match=r"single name of type 'LOC' \(a\.conll, line 1\)"):
        TagSet.of(examples_of(one))
    with pytest.raises(LabelError, match="every tag is O"):
        TagSet.of(examples_of(sentence(["a"])))
    with pytest.raises(LabelError, match=r"b, line 2: type 'ORG' is not among those of the training rows: LOC, PER"):
        TAGS.numbers(["O", "B-ORG"], "b, line 2")
    with pytest.raises(LabelError, match="expected O, then B- and I- of each type"):
        TagSet.of_config(NemotronConfig(num_labels=3))


def tiny() -> NemotronForTokenClassification:
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, pad_token_id=0, **TAGS.config(),
    )  # fmt: skip
    return NemotronForTokenClassification(config).eval()


def test_the_loss_is_that_of_the_head_however_a_step_is_cut() -> None:
    model, generator = tiny().double(), random.Random(0)
    rows = []
    for length in (3, 9, 4, 12, 5):
        labels = [generator.choice([IGNORE_INDEX, 0, 1, 2, 3, 4]) for _ in range(length)]
        rows.append(Row(tuple(generator.randrange(1, 300) for _ in range(length)), {}, (1, *labels[1:])))
    batch = pad_rows(rows, 0)
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.targets["labels"]).loss
    ours, _ = TokenLoss()(model, batch)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=1e-6, atol=1e-7)
    stream = RowStream(rows, 0, seed=0, sequence=64)
    for parts in (
        stream.batches(0, 5, 2),
        [*stream.batches(0, 5, 1, share=(0, 2)), *stream.batches(0, 5, 1, share=(1, 2))],
    ):
        cut = sum(TokenLoss()(model, part)[0] for part in parts)
        torch.testing.assert_close(torch.as_tensor(cut).double(), theirs.double(), rtol=1e-6, atol=1e-7)


def test_neither_neighbours_nor_padding_change_a_prediction(tokenizer) -> None:
    model = tiny().double()
    items = [sentence(["word"] * n + ["Ada"]) for n in (1, 7, 3, 20)]  # the last one takes several windows
    together = predict_tags(model, tokenizer, items, TAGS, 0, 48)
    for item, (tags, shares) in zip(items, together, strict=True):
        ((alone, share),) = predict_tags(model, tokenizer, [item], TAGS, 0, 48, at_once=1)
        assert alone == tags
        np.testing.assert_allclose(share, shares, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_the_best_path_is_the_best_of_all_that_are_allowed(seed: int, words: int) -> None:
    scores = np.random.default_rng(seed).normal(size=(words, len(TAGS.names)))
    names = TAGS.names

    def allowed(path: tuple[int, ...]) -> bool:
        before = "O"
        for number in path:
            if names[number][0] == "I" and names[number][2:] != before[2:]:
                return False
            before = names[number]
        return True

    paths = filter(allowed, itertools.product(range(len(names)), repeat=words))
    best = max(paths, key=lambda path: sum(scores[i, c] for i, c in enumerate(path)))
    assert tuple(best_path(scores, TAGS)) == best


def test_scores_are_those_of_seqeval() -> None:
    generator = random.Random(1)
    texts = [[generator.choice(TAGS.names) for _ in range(generator.randrange(1, 12))] for _ in range(120)]
    truth = [list(tagged()({"words": ["w"] * len(t), "tags": t}).tags) for t in texts]  # type: ignore[union-attr]
    ours = [[tag if generator.random() < 0.6 else generator.choice(TAGS.names) for tag in tags] for tags in truth]
    made = [list(tagged()({"words": ["w"] * len(t), "tags": t}).tags) for t in ours]  # type: ignore[union-attr]
    found = name_scores(made, truth)
    for name, theirs in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        assert found[name] == pytest.approx(theirs(truth, made, mode="strict", scheme=IOB2), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(f1_score(truth, made, average="macro", mode="strict", scheme=IOB2))
    assert sum(row["names"] for row in by_type(made, truth).values()) == sum(
        t[0] == "B" for tags in truth for t in tags
    )
    assert name_scores(truth, truth)["f1"] == 1.0


def test_the_gazetteer_knows_the_longest_names_and_forgets_what_is_rarely_one() -> None:
    train = [
        sentence(["New", "York", "and", "York"], ["B-LOC", "I-LOC", "O", "B-LOC"]),
        sentence(["May", "sat"], ["B-PER", "O"]),
        sentence(["in", "May", "or", "May", "or", "May"]),
    ]
    found = gazetteer(train, [sentence(["York", "New", "York", "May"])])
    assert found == [["B-LOC", "B-LOC", "I-LOC", "O"]]


@pytest.mark.parametrize("attention", ["causal", "bidirectional", "bidirectional:1"])
def test_from_tagged_rows_to_names(tokenizer, tmp_path: Path, attention: str) -> None:
    """The kind of a name follows from the word after it, which only a model that reads both sides can see."""
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=48,
    )  # fmt: skip
    NemotronForCausalLM(config).save_pretrained(tmp_path / "base")
    rows = [{"tokens": ["x", "ab"[i % 2]], "tags": ["B-PER" if i % 2 else "B-LOC", "O"]} for i in range(80)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [
        "--data",
        tmp_path / "rows.jsonl",
        "--validation",
        tmp_path / "rows.jsonl",
        "--test",
        tmp_path / "rows.jsonl",
    ]
    options = ["--task", "ner", *data, "--lr", "1e-2", "--epochs", "8", "--batch", "8", "--attention", attention]
    code, out, err = call(finetune, tmp_path / "base", *options, "--out", tmp_path / "run", "--dtype", "fp32")
    assert code == 0, err
    assert "[[x|LOC]] a" in err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    if attention == "causal":
        assert report["scores"]["model"]["f1"] == pytest.approx(0.5)
        return
    assert report["scores"]["model"]["f1"] == 1.0, out
    (tmp_path / "new.jsonl").write_text('{"text": "x a"}\n{"tokens": ["x", "b"]}\n')
    code, _, err = call(predict, tmp_path / "run" / "model", tmp_path / "new.jsonl", "--out", tmp_path / "o.jsonl")
    assert code == 0, err
    found = [json.loads(line)["entities"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [[(e["text"], e["label"], e["start"]) for e in each] for each in found] == [
        [("x", "LOC", 0)],
        [("x", "PER", 0)],
    ]
