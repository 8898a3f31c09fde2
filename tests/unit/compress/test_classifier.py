"""Compressing a classifier: half the parameters, the task's own score, the head kept; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from text_checkpoint import save_byte_tokenizer
from verb_calls import call

from minitron import NemotronConfig
from minitron.cli.compress import compress
from minitron.cli.finetune import finetune
from minitron.cli.predict import predict
from minitron.heads import NemotronForCausalLM, NemotronForSequenceClassification
from minitron.tokenizer import load_tokenizer
from minitron.tune.labels import DistilledLabelLoss
from minitron.tune.rows import Row, pad_rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows whose first letter decides the label, and a classifier that has learned it in `run/model`."""
    folder = tmp_path_factory.mktemp("classifier")
    save_byte_tokenizer(folder / "base")
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=len(load_tokenizer(folder / "base")), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=48,
    )  # fmt: skip
    NemotronForCausalLM(config).save_pretrained(folder / "base")
    lines = [{"mail": f"{'yes' if i % 2 else 'no'} {i}", "kind": "good" if i % 2 else "bad"} for i in range(100)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--task", "classify", "--data", folder / "rows.jsonl", "--field", "text=mail", "--field", "label=kind"]
    options += ["--lr", "3e-3", "--epochs", "3", "--batch", "8", "--dtype", "fp32"]
    code, _, err = call(finetune, folder / "base", *options, "--out", folder / "run")
    assert code == 0, err
    return folder


FIELDS = ("--field", "text=mail,label=kind", "--lr", "3e-3", "--batch", "8")


def test_half_of_a_classifier_keeps_its_head_and_its_score(trained: Path, tmp_path: Path) -> None:
    given = [trained / "run/model", tmp_path / "half", "--params", "50%", "--data", trained / "rows.jsonl", *FIELDS]
    code, out, err = call(compress, *given, "--candidates", "3", "--dry-run")
    assert (code, out) == (0, "")
    assert "within the budget: 2 shapes" in err
    assert not (tmp_path / "half").exists()
    code, out, err = call(compress, *given, "--candidates", "3")
    assert code == 0, err
    report = json.loads((tmp_path / "half/report.json").read_text())
    sizes = report["parameters"]
    parent = NemotronForSequenceClassification.from_pretrained(trained / "run/model")
    assert sizes["parent"] == sum(p.numel() for p in parent.parameters())
    assert 0.35 * sizes["parent"] < sizes["model"] <= 0.5 * sizes["parent"]
    assert sizes["right after pruning"] == sizes["model"]
    scores = report["scores"]
    assert list(scores) == ["model", "parent", "right after pruning", "commonest label", "TF-IDF + linear model"]
    assert scores["model"]["accuracy"] == scores["parent"]["accuracy"] == 1.0, out
    losses = [row["loss"] for row in json.loads((tmp_path / "half/choice/stage.json").read_text())["facts"]["scores"]]
    assert len(losses) == 2
    code, _, err = call(compress, *given, "--candidates", "3")
    assert code == 0, err
    assert err.count("done before") == 4
    code, _, err = call(compress, *given, "--candidates", "1")
    assert code == 2
    assert "other inputs" in err
    rows = tmp_path / "new.jsonl"
    rows.write_text('{"text": "no 100"}\n{"text": "yes 101"}\n')
    code, _, err = call(predict, tmp_path / "half/model", rows, "--out", tmp_path / "out.jsonl")
    assert code == 0, err
    assert [json.loads(line)["label"] for line in (tmp_path / "out.jsonl").read_text().splitlines()] == ["bad", "good"]


def test_refusals(trained: Path, tmp_path: Path) -> None:
    model, rows, out = trained / "run/model", trained / "rows.jsonl", tmp_path / "out"
    unknown = tmp_path / "unknown.jsonl"
    unknown.write_text(rows.read_text() + '{"mail": "x", "kind": "ugly"}\n')
    for options, message in (
        (["--params", "50%"], "--data is missing: labelled rows"),
        (["--data", rows, *FIELDS], "give one budget"),
        (["--data", rows, *FIELDS, "--params", "150%"], "a share must be more than 0% and less than 100%"),
        (["--data", rows, *FIELDS, "--params", "9G"], "nothing needs to be cut"),
        (["--data", rows, *FIELDS, "--params", "10"], "the head alone has 64 parameters"),
        (["--data", rows, *FIELDS, "--speed", "9tok/s"], "--speed is not for sequence classifiers"),
        (["--data", rows, *FIELDS, "--keep", "ffn=1000"], "ffn"),
        (["--data", rows, "--params", "50%"], "the field 'text'"),
        (["--data", unknown, *FIELDS, "--params", "50%"], f"{unknown}, line 101: label 'ugly' is not among"),
        (["--data", rows, *FIELDS, "--params", "50%", "--heldout-share", "0"], "--heldout-share is 0"),
    ):
        code, _, err = call(compress, model, out, *options)
        assert (code, message in err) == (2, True), err
        assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    code, _, err = call(compress, model, out, "--data", rows, *FIELDS, "--params", "50%")
    assert code == 2
    assert "is not empty and is not the folder of such a run" in err
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "names").mkdir()
    (tmp_path / "names/config.json").write_text(
        json.dumps({**config, "architectures": ["NemotronForTokenClassification"]})
    )
    code, _, err = call(compress, tmp_path / "names", tmp_path / "new", "--params", "50%", "--data", rows)
    assert code == 2
    assert "compress works on language models and sequence classifiers" in err


@pytest.mark.parametrize("problem", ["one", "several", "number"])
def test_the_divergence_is_that_of_torch_and_none_from_itself(problem: str) -> None:
    torch.manual_seed(0)
    loss = DistilledLabelLoss(problem)  # type: ignore[arg-type]
    classes = 1 if problem == "number" else 3
    logits, teacher = torch.randn(5, classes), torch.randn(5, classes)
    found = loss.divergence(logits, teacher)
    if problem == "one":
        theirs = torch.nn.functional.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)
    elif problem == "several":
        pairs = [torch.distributions.Bernoulli(logits=each) for each in (teacher, logits)]
        theirs = torch.distributions.kl_divergence(*pairs).mean(-1)
    else:
        theirs = (logits - teacher).square()[:, 0]
    torch.testing.assert_close(found, theirs)
    assert float(loss.divergence(teacher, teacher).abs().max()) < 1e-6
    config = NemotronConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8, num_labels=classes, pad_token_id=0,
    )  # fmt: skip
    model = NemotronForSequenceClassification(config).eval()
    target = {"one": 1, "several": [1.0, 0.0, 1.0], "number": 0.5}[problem]
    batch = pad_rows([Row((3, 4, 5), {"labels": target, "teacher": [0.5] * classes})] * 2, 0)
    out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    both = loss.of_logits(out, batch.targets["labels"]) + loss.divergence(out, batch.targets["teacher"])
    torch.testing.assert_close(loss(model, batch)[0], both.mean() / 2)
