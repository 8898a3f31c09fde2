"""Classification: labels as numbers, losses against the heads' own, predictions that no neighbour changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from text_checkpoint import save_byte_tokenizer
from verb_calls import call

from minitron import NemotronConfig, NemotronForCausalLM
from minitron.cli.finetune import finetune
from minitron.cli.predict import predict
from minitron.data.examples import Examples, Labelled
from minitron.heads import NemotronForSequenceClassification
from minitron.tokenizer import load_tokenizer
from minitron.train.adapters import choose_trained, merged_weights
from minitron.tune.labels import LabelError, LabelLoss, LabelSet, class_weights, predict_logits
from minitron.tune.rows import CPU_TOKENS, Row, RowStream, pad_rows, padded_batches


def tiny(labels: int = 3, problem: str | None = None, pad: int = 0) -> NemotronForSequenceClassification:
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, num_labels=labels, problem_type=problem, pad_token_id=pad,
    )  # fmt: skip
    return NemotronForSequenceClassification(config).eval()


def rows(problem: str, count: int = 7, labels: int = 3) -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    out = []
    for index in range(count):
        ids = tuple(torch.randint(1, 64, (3 + 2 * index % 11,), generator=generator).tolist())
        target = {"one": index % labels, "several": [float(index >> c & 1) for c in range(labels)], "number": index / 3}
        out.append(Row(ids, {"labels": target[problem]}))
    return out


@pytest.mark.parametrize(
    ("problem", "kind"),
    [("one", "single_label_classification"), ("several", "multi_label_classification"), ("number", "regression")],
)
def test_the_loss_is_that_of_the_head_however_a_step_is_cut(problem: str, kind: str) -> None:
    model = tiny(1 if problem == "number" else 3, kind).double()
    examples = rows(problem)
    loss = LabelLoss(problem)  # type: ignore[arg-type]
    batch = pad_rows(examples, 0)
    targets = batch.targets["labels"] if problem == "one" else batch.targets["labels"].double()
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=targets).loss
    ours, _ = loss(model, batch)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-7)
    stream = RowStream(examples, 0, seed=0, sequence=32)
    whole, parts = stream.batches(0, 7, 7), stream.batches(0, 7, 3)
    gradients = []
    for batches in (whole, parts):
        model.zero_grad()
        for each in batches:
            loss(model, each)[0].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, many in zip(*gradients, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-7)


def test_class_weights_are_those_of_torch() -> None:
    examples = [Row((1, 2), {"labels": c}) for c in (0, 0, 0, 1)]
    weights = class_weights(examples, 2)
    torch.testing.assert_close(weights, torch.tensor([4 / 6, 2.0]))
    logits, targets = torch.randn(4, 2), torch.tensor([0, 0, 0, 1])
    ours = LabelLoss("one", weights).of_logits(logits, targets).mean()
    # torch divides by the sum of the weights, which is the number of rows here.
    torch.testing.assert_close(ours, torch.nn.functional.cross_entropy(logits, targets, weight=weights))


def test_neither_neighbours_nor_padding_change_a_prediction() -> None:
    model, examples = tiny().double(), rows("one", 20)
    alone = torch.cat([torch.tensor(predict_logits(model, [row], 0)) for row in examples])
    for at_once in (2, 7, 20):
        together = torch.tensor(predict_logits(model, examples, 0, at_once))
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_adapters_and_a_head_trained_in_full_merge_into_the_plain_model() -> None:
    model = tiny()
    names = set(model.state_dict())
    adapted = choose_trained(model, "lora", 4, whole=("score",))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)
    ids = torch.randint(1, 64, (2, 7))
    merged = merged_weights(adapted)
    assert set(merged) == names
    plain = tiny()
    before = plain(input_ids=ids).logits
    plain.load_state_dict(merged)
    torch.testing.assert_close(plain(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain(input_ids=ids).logits, before, atol=1e-3)


def examples_of(*labels: object) -> Examples[Labelled]:
    items = [Labelled(f"text {i}", None, label) for i, label in enumerate(labels)]  # type: ignore[arg-type]
    return Examples(items, [f"a.csv, line {i + 2}" for i in range(len(items))])


def test_label_sets() -> None:
    assert LabelSet.of(examples_of("10", "9", "10", "9"), "one").names == ("9", "10")  # by value, not by letters
    assert LabelSet.of(examples_of("b", "a", "a", "b"), "one").names == ("a", "b")
    several = LabelSet.of(examples_of(("a", "b"), (), ("b", "a")), "several")
    assert several.number(("b",), "") == [0.0, 1.0]
    with pytest.raises(LabelError, match=r"label 'b' has a single row \(a\.csv, line 3\)"):
        LabelSet.of(examples_of("a", "b", "a"), "one")
    with pytest.raises(LabelError, match="every row has the label 'a'"):
        LabelSet.of(examples_of("a", "a"), "one")
    with pytest.raises(
        LabelError, match=r"b\.csv, line 9: label 'c' is not among those of the training rows: 'a', 'b'"
    ):
        LabelSet.of(examples_of("a", "b", "a", "b"), "one").number("c", "b.csv, line 9")
    config = NemotronConfig(**LabelSet("several", ("x", "y")).config())  # type: ignore[arg-type]
    assert LabelSet.of_config(config) == LabelSet("several", ("x", "y"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random language model with a byte tokenizer, and rows whose first letter is the label."""
    folder = tmp_path_factory.mktemp("base")
    save_byte_tokenizer(folder / "model")
    tokenizer = load_tokenizer(folder / "model")
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=48,
    )  # fmt: skip
    NemotronForCausalLM(config).save_pretrained(folder / "model")
    lines = [{"text": f"{'yes' if i % 2 else 'no'} {i}", "label": "good" if i % 2 else "bad"} for i in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_from_rows_to_labels(base: Path, tmp_path: Path) -> None:
    options = ["--task", "classify", "--data", base / "rows.jsonl", "--lr", "3e-3", "--epochs", "3", "--batch", "8"]
    code, out, err = call(finetune, base / "model", *options, "--out", tmp_path / "run", "--dtype", "fp32")
    assert code == 0, err
    assert "| model | 1.0000 |" in out
    assert "--- example 1 ---" in err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["labels"] == ["bad", "good"]
    assert set(report["scores"]) == {"model", "commonest label", "TF-IDF + linear model"}
    assert report["test_rows"] == 8
    assert "commonest label" in (tmp_path / "run" / "model" / "README.md").read_text()
    code, out, err = call(finetune, base / "model", *options, "--out", tmp_path / "run", "--dtype", "fp32")
    assert code == 0, err  # a finished run can be done again
    code, _, err = call(finetune, base / "model", *options, "--lr", "1e-3", "--out", tmp_path / "run")
    assert (code, "lr" in err) == (2, True), err
    new = tmp_path / "new.jsonl"
    new.write_text('{"text": "no 100"}\n{"text": "yes 101", "label": "ignored"}\n')
    code, out, err = call(predict, tmp_path / "run" / "model", new, "--out", tmp_path / "out.jsonl")
    assert code == 0, err
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["label"] for row in found] == ["bad", "good"]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5) for row in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.jsonl", "out.jsonl", "run"]


def test_a_preview_trains_nothing(base: Path, tmp_path: Path) -> None:
    options = ["--task", "classify", "--data", base / "rows.jsonl", "--preview", "--out", tmp_path / "run"]
    code, _, err = call(finetune, base / "model", *options)
    assert code == 0, err
    assert "--- example 3 ---\ngood: yes" in err or "bad: no" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text": "x"}', "{bad}, line 81: the field 'label' (or 'labels', 'class', 'category', 'target') is missing"),
        ('{"text": " ", "label": "good"}', '{bad}, line 81: text is " "; expected a text'),
        ('{"text": "<pad><pad>", "label": "good"}', "{bad}, line 81: the text '<pad><pad>' has no tokens but padding"),
        ('{"text": "x", "label": "single"}', "label 'single' has a single row ({bad}, line 81)"),
        ('{"text": "x", "label": NaN}', "{bad}, line 81: label is NaN; expected a name or an integer"),
        ('{"messages": []}', "{bad}, line 81: the field 'text'"),
        ('{"text": "x", ', "{bad}, line 81"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(base: Path, tmp_path: Path, row: str, message: str) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text((base / "rows.jsonl").read_text() + row + "\n")
    options = ["--task", "classify", "--data", bad, "--split", "0", "--steps", "1", "--out", tmp_path / "run"]
    code, _, err = call(finetune, base / "model", *options)
    assert (code, message.format(bad=bad) in err) == (2, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_numbers_and_test_rows_are_checked_before_training(base: Path, tmp_path: Path) -> None:
    numbers, unseen = tmp_path / "numbers.jsonl", tmp_path / "unseen.jsonl"
    numbers.write_text('{"text": "x", "label": 1.5}\n{"text": "y", "label": NaN}\n')
    unseen.write_text('{"text": "x", "label": "good"}\n{"text": "y", "label": "ugly"}\n')
    for options, message in (
        (["--data", numbers, "--labels", "number"], f"{numbers}, line 2: label is NaN; expected a finite number"),
        (["--data", base / "rows.jsonl", "--test", unseen], f"{unseen}, line 2: label 'ugly' is not among those"),
        (["--data", base / "rows.jsonl", "--validation", unseen], f"{unseen}, line 2: label 'ugly' is not among those"),
    ):
        code, _, err = call(
            finetune, base / "model", "--task", "classify", *options, "--steps", "1", "--out", tmp_path / "run"
        )
        assert (code, message in err) == (2, True), err
        assert not (tmp_path / "run").exists()


def test_refusals(base: Path, tmp_path: Path) -> None:
    rows_file, out = base / "rows.jsonl", tmp_path / "run"
    for arguments, message in (
        (["--task", "sing", "--data", rows_file], "--task is 'sing'; it must be one of chat, classify, ner, qa"),
        (["--task", "classify", "--data", rows_file, "--field", "text"], "it must be FIELD=NAME"),
        (["--task", "classify", "--data", rows_file, "--field", "text=words"], "the field 'words' is missing"),
        (["--task", "classify", "--data", rows_file, "--epochs", "1", "--steps", "3"], "--epochs and --steps"),
        (["--task", "chat", "--data", rows_file], "the field 'messages'"),
        (["--task", "chat", "--data", rows_file, "--balance"], "--balance weighs the classes"),
    ):
        code, _, err = call(finetune, base / "model", *arguments, "--out", out)
        assert (code, message in err) == (2, True), err
        assert not out.exists()
    code, _, err = call(predict, base / "model", rows_file, "--out", tmp_path / "o.jsonl")
    assert code == 2
    assert "the model has no head of its own" in err


def test_batches_hold_rows_of_similar_lengths_and_few_tokens() -> None:
    """Every row once, the longest first; on a CPU no batch above the limit but that of a single row."""
    lengths = [3, 700, 40, 41, 7, 100, 120, 5, 90, *[2] * 40]
    rows = [Row(tuple(range(1, length + 1)), {}) for length in lengths]
    batches = list(padded_batches(rows, 0, 32, torch.device("cpu")))
    assert sorted(number for numbers, _ in batches for number in numbers) == list(range(len(rows)))
    widths = [batch.input_ids.shape[1] for _, batch in batches]
    assert widths == sorted(widths, reverse=True)
    assert widths[:2] == [700, 120]
    for numbers, batch in batches:
        assert len(numbers) <= 32
        assert batch.input_ids.numel() <= CPU_TOKENS or len(numbers) == 1
        assert batch.attention_mask.sum(1).tolist() == [lengths[number] for number in numbers]
    assert len(batches[1][0]) == 4  # 100, 90 and 41 tokens beside 120
    elsewhere = list(padded_batches(rows, 0, 32, torch.device("meta")))
    assert [len(numbers) for numbers, _ in elsewhere] == [32, 17]
