"""The loop trains what is not packed text: labelled rows, and conversations, with measures of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from padded_examples import Accuracy, Examples, answer_loss, conversations, labelled_rows, row_loss
from small_run import small_config, small_model, small_stream
from torch import nn

from minitron import NemotronForSequenceClassification
from minitron.train.heldout import HeldoutText
from minitron.train.log import METRICS_FILE
from minitron.train.loop import Result, TrainError, next_token_loss, train
from minitron.train.objective import Numbers
from minitron.train.stream import Stream


def classifier(dropout: float = 0.0) -> NemotronForSequenceClassification:
    config = small_model(dropout).config
    config.num_labels, config.pad_token_id = 2, 0
    torch.manual_seed(1)
    return NemotronForSequenceClassification(config)


def metrics(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")} for row in rows]


def train_rows(
    run: Path, steps: int = 6, until: int | None = None, dropout: float = 0.1, count: int = 30, **changes: Any
) -> Result:
    settings = small_config(steps, **{"save_every": 2, "eval_every": 2, "dtype": "float32", **changes})
    measures = {"rows": Accuracy(labelled_rows(40, seed=9))}
    model = classifier(dropout)
    return train(model, labelled_rows(count), settings, run, loss=row_loss, heldout=measures, quiet=True, until=until)


def train_answers(
    run: Path, steps: int = 6, until: int | None = None, model: nn.Module | None = None, **changes: Any
) -> Result:
    settings = small_config(steps, **{"save_every": 2, "dtype": "float32", **changes})
    stream = conversations(30)
    held = {"text": small_stream().sources[0], "exact": exact_answers}
    model = model or small_model(dropout=0.1)
    return train(model, stream, settings, run, loss=answer_loss, heldout=held, quiet=True, until=until)


def exact_answers(model: nn.Module) -> Mapping[str, float]:
    """Share of answers' tokens that are the most likely ones; checks how a measure is called."""
    assert not model.training
    assert not torch.is_grad_enabled()
    right = total = 0
    for ids, labels in conversations(20, seed=5).rows:
        best = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].argmax(-1)
        for position, label in enumerate(labels[1:]):
            if label != -100:
                right, total = right + int(best[position] == label), total + 1
    return {"right": right / total}


@pytest.mark.parametrize("run_of", [train_rows, train_answers])
def test_an_interrupted_run_continues_bit_for_bit(tmp_path: Path, run_of: Any) -> None:
    whole = run_of(tmp_path / "whole")
    assert run_of(tmp_path / "parts", until=3).stopped_by == "until=3"
    parts = run_of(tmp_path / "parts")
    assert (parts.step, parts.tokens, parts.loss, parts.heldout) == (6, whole.tokens, whole.loss, whole.heldout)
    extra = [row for row in metrics(tmp_path / "parts") if row["step"] == 3 and "loss" not in row]
    assert len(extra) == len(parts.heldout)  # the measurements of the first call's end
    assert [row for row in metrics(tmp_path / "parts") if row not in extra] == metrics(tmp_path / "whole")
    one, other = ((run / "model.safetensors").read_bytes() for run in (whole.model, parts.model))
    assert one == other


def test_a_classifier_learns_its_labels(tmp_path: Path) -> None:
    settings = {"dropout": 0.0, "count": 600, "lr": 1e-2, "batch": 16, "micro_batch": 8, "save_every": 0}
    result = train_rows(tmp_path / "run", steps=150, eval_every=50, **settings)
    rows = metrics(tmp_path / "run")
    measured = [row["step"] for row in rows if "heldout/rows/accuracy" in row]
    assert measured == [50, 100, 150]
    assert Accuracy(labelled_rows(40, seed=9))(classifier().eval())["accuracy"] < 0.7
    assert result.heldout["rows"]["accuracy"] > 0.9
    trained = NemotronForSequenceClassification.from_pretrained(result.model).eval()
    assert Accuracy(labelled_rows(40, seed=9))(trained) == result.heldout["rows"]
    assert rows[0]["accuracy"] <= 1  # the loss's own number, summed over micro-batches


def test_only_answers_are_learned(tmp_path: Path) -> None:
    """Against a loop of torch.optim.AdamW over one conversation at a time, without padding."""
    config = {"batch": 6, "micro_batch": 3, "warmup": 0, "clip": 0, "save_every": 0, "schedule": "constant"}
    result = train_answers(tmp_path / "run", steps=3, model=small_model().double(), **config)
    plain, stream = small_model().double(), conversations(30)
    matrices, vectors = ([p for p in plain.parameters() if p.ndim == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), foreach=False)
    expected = []
    for step in range(3):
        examples = [stream.at(6 * step + i) for i in range(6)]
        terms = []
        for ids, labels in examples:
            logits = plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
            terms += [-logits[i - 1, label] for i, label in enumerate(labels) if label != -100]
        loss = torch.stack(terms).mean()
        expected.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = [row["loss"] for row in metrics(tmp_path / "run") if "loss" in row]
    assert found == pytest.approx(expected, rel=1e-6)
    trained = type(plain).from_pretrained(result.model, dtype=torch.float64)
    for (name, ours), theirs in zip(trained.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4, msg=name)  # a step is 3e-3
    assert set(result.heldout) == {"text", "exact"}
    assert set(result.heldout["text"]) == {"nats_per_token", "bits_per_byte"}


def test_tokens_are_counted_as_they_are_with_their_padding(tmp_path: Path) -> None:
    result = train_rows(tmp_path / "run", steps=3)
    stream = labelled_rows(30)
    batches = [batch for step in range(3) for batch in stream.batches(4 * step, 4, 2)]
    assert result.tokens == sum(batch.input_ids.numel() for batch in batches) < 3 * 4 * 16


def test_a_checkpoint_that_does_not_count_tokens_continues(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = small_config(4, save_every=2)
    first = train(small_model(), small_stream(), settings, run, quiet=True, until=2)
    path = first.checkpoint / "state.json"
    record = json.loads(path.read_text())
    assert record["state"].pop("tokens") == 2 * 4 * 16
    path.write_text(json.dumps(record))
    assert train(small_model(), small_stream(), settings, run, quiet=True).tokens == 4 * 4 * 16


def test_other_data_or_examples_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_rows(run, until=2)
    before = (run / "train.json").read_bytes()
    settings = small_config(6, save_every=2, eval_every=2, dtype="float32")
    with pytest.raises(TrainError, match="holds another run"):
        train(classifier(0.1), labelled_rows(30, seed=3), settings, run, loss=row_loss, quiet=True)
    assert (run / "train.json").read_bytes() == before
    with pytest.raises(ValueError, match="tokens; the run's sequence is 4"):
        train_rows(tmp_path / "short", sequence=4)
    with pytest.raises(ValueError, match="token id 99; the model's vocab_size is 50"):
        train(classifier(), Examples([([99], 0)]), settings, tmp_path / "new", loss=row_loss, quiet=True)
    assert not (tmp_path / "short").exists()
    assert not (tmp_path / "new").exists()


def test_packed_text_is_a_stream() -> None:
    stream: Stream = small_stream()
    assert list(stream.key.values()) == [1.0]
    other = small_stream(documents=59)
    other.sources[0].cache = replace(other.sources[0].cache, key="other" * 4)
    assert other.key != stream.key
    (batch,) = stream.batches(3, 2, 2)
    assert batch.num_tokens == 2 * 16


def test_the_numbers_of_a_loss_are_read_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In four micro-batches nothing is read from the device; numbers that are not read cannot hold the device up."""
    reads: list[str] = []
    allowed = Numbers.read

    def read(self: Numbers) -> dict[str, float]:
        reads.append("read")
        return allowed(self)

    def loss(model: nn.Module, batch: Any) -> Any:
        value, _ = next_token_loss(model, batch)
        return value, {"twice": 2 * value.detach(), "one": 0.25}

    monkeypatch.setattr(Numbers, "read", read)
    config = small_config(2, batch=8, micro_batch=2, save_every=0)
    train(small_model(), small_stream(), config, tmp_path / "run", loss=loss, quiet=True)
    assert reads == ["read"] * 2
    for row in metrics(tmp_path / "run"):
        assert row["twice"] == pytest.approx(2 * row["loss"], rel=1e-12)
        assert row["one"] == 1.0


def test_held_out_text_may_be_measured_with_another_loss(tmp_path: Path) -> None:
    blocks = small_stream().sources[0]
    model = small_model().eval()

    def squared(net: nn.Module, batch: Any) -> Any:
        value, _ = next_token_loss(net, batch)
        return value, {"ce": value, "double": 2 * value}

    with torch.no_grad():
        plain, found = HeldoutText(blocks, 3)(model), HeldoutText(blocks, 3, squared)(model)
    assert found.pop("double") == pytest.approx(2 * plain["nats_per_token"], rel=1e-12)
    assert found == plain
