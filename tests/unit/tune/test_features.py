"""A head on a frozen backbone: hidden states computed once give the head's own logits, losses and gradients."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from minitron import NemotronConfig
from minitron.assets import bundled_model
from minitron.checkpoint.weight_files import read_tensors
from minitron.cli.finetune import finetune
from minitron.heads import NemotronForSequenceClassification
from minitron.tokenizer import load_tokenizer
from minitron.train.adapters import choose_trained
from minitron.train.run_folder import TrainError
from minitron.tune.encoding import LabelError, encode_turns
from minitron.tune.features import FeatureLoss, FeatureStream, features_of
from minitron.tune.labels import LabelLoss, predict_logits
from minitron.tune.predict import open_predictor
from minitron.tune.rows import Row, RowStream


def tiny() -> NemotronForSequenceClassification:
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return NemotronForSequenceClassification(config).eval()


def rows(count: int = 11) -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    return [
        Row(tuple(torch.randint(1, 64, (2 + 3 * index % 13,), generator=generator).tolist()), {"labels": index % 3})
        for index in range(count)
    ]


def test_features_give_the_logits_losses_and_gradients_of_the_whole_model() -> None:
    model, examples = choose_trained(tiny(), "head", whole=("score",)), rows()
    examples.append(Row((*examples[0].ids, 0), {"labels": 2}))  # ends with the token that pads, which is not judged
    features = features_of(model, examples, 0, at_once=4)
    logits = model.score(features).detach().numpy()
    assert abs(logits - predict_logits(model, examples, 0)).max() < 1e-5
    stream = RowStream(examples, 0, seed=3, sequence=32)
    loss = LabelLoss("one")
    found = []
    for source, measure in ((stream, loss), (FeatureStream(examples, features, stream), FeatureLoss(loss))):
        model.zero_grad()
        for step in range(2):
            parts = [measure(model, batch)[0] for batch in source.batches(9 * step, 9, 4)]
            sum(parts).backward()  # type: ignore[union-attr]
        found.append(model.score.weight.grad.clone())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["score.weight"]


def test_a_model_without_a_head_has_no_head_to_train() -> None:
    with pytest.raises(TrainError, match="needs a model with a head of its own"):
        choose_trained(tiny(), "head")


def test_messages_are_encoded_as_the_chat_template_writes_them() -> None:
    tokenizer = load_tokenizer(bundled_model("half"))
    messages = [{"role": "user", "content": "Buy my cheap pills now"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    alone, answered = encode_turns(tokenizer, [("Buy my cheap pills now", None), ("Hi", "A fox.")], 128)
    assert alone == tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(answered).endswith(tokenizer.decode(alone)[-12:] + "A fox.")


@pytest.mark.parametrize("pair", [None, "and an answer " * 50])
def test_a_long_message_is_cut_and_keeps_the_heading_of_the_answer(pair: str | None) -> None:
    tokenizer = load_tokenizer(bundled_model("half"))
    [short] = encode_turns(tokenizer, [("x", None)], 64)
    [long] = encode_turns(tokenizer, [("the old man and the sea " * 50, pair)], 64)
    assert 48 <= len(long) <= 64
    if pair is None:
        assert long[-4:] == short[-4:]
    with pytest.raises(LabelError, match="which the chat template alone takes"):
        encode_turns(tokenizer, [("x", None)], 5)


def test_only_the_head_of_a_trained_guard_differs_from_the_model(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(finetune)
    data = tmp_path / "mails.jsonl"
    texts = [("spam", f"Buy {index} pills now, cheap offer") for index in range(20)]
    texts += [("ham", f"I saw {index} birds in the garden today") for index in range(20)]
    data.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for label, text in texts))
    given = ["bundled-half", "--task", "classify", "--data", str(data), "--tune", "head", "--chat", "--lr", "0.05"]
    done = CliRunner().invoke(app, [*given, "--epochs", "20", "--sequence", "64", "--out", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    trained, base = read_tensors(tmp_path / "run/model"), read_tensors(bundled_model("half"))
    assert trained.keys() - base.keys() == {"score.weight"}
    for name in trained.keys() & base.keys():
        assert torch.equal(trained[name].load(), base[name].load().float()), name
    assert json.loads((tmp_path / "run/model/config.json").read_text())["text_format"] == "chat"
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["scores"]["model"]["accuracy"] == 1
    check_calibration(tmp_path / "run/model", report["temperature"])


def check_calibration(model: Path, temperature: float) -> None:
    """The stored temperature divides the log-odds of the probabilities, on demand only."""
    tokenizer = load_tokenizer(model)
    saved = json.loads((model / "config.json").read_text())
    assert saved["label_temperature"] == temperature
    (model / "config.json").write_text(json.dumps({**saved, "label_temperature": 4.0}))
    plain, calibrated = (open_predictor(model, tokenizer, "fp32", "cpu", 64, wanted) for wanted in (False, True))
    item = plain.convert({"text": "Buy pills in the garden"})
    odds = []
    for predictor in (plain, calibrated):
        [found] = predictor.predict([item], 1)
        odds.append(math.log(found["probabilities"]["spam"] / found["probabilities"]["ham"]))
    assert abs(odds[0]) > 0.1
    assert odds[1] == pytest.approx(odds[0] / 4, rel=0.02)
    del saved["label_temperature"]
    (model / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match=r"label_temperature is None; calibrated .* need the positive number"):
        open_predictor(model, tokenizer, "fp32", "cpu", 64, True)
