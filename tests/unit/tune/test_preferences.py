"""Preferences: rows and tokens, DPO and IPO by their definitions, the reference that is kept, and the whole way."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from text_checkpoint import save_byte_tokenizer
from torch.nn import functional as F
from verb_calls import call

from minitron import NemotronConfig, NemotronForCausalLM
from minitron.cli.finetune import finetune
from minitron.cli.predict import predict
from minitron.data.documents.problems import Bad
from minitron.data.examples import Examples
from minitron.data.preferences import Preference, preference
from minitron.heads import NemotronForSequenceClassification
from minitron.ops.loss import IGNORE_INDEX
from minitron.tokenizer import load_tokenizer
from minitron.tune.conversations import ConversationError
from minitron.tune.pairs import Pair, PairStream, encode_pairs, pad_pairs
from minitron.tune.preferences import PreferenceLoss, RewardLoss, reply_log_probabilities, rewards, with_reference
from minitron.tune.rows import Row

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in
                   (("user", "Hi"), ("assistant", "Hello!"), ("assistant", "No.")))  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def folder_of(place: Path, positions: int = 64) -> Path:
    """A random language model with a byte tokenizer and a chat template."""
    save_byte_tokenizer(place)
    tokenizer = load_tokenizer(place)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    NemotronForCausalLM(tiny_config(len(tokenizer), positions)).save_pretrained(place)
    return place


def tiny_config(vocabulary: int, positions: int = 64) -> NemotronConfig:
    torch.manual_seed(0)
    return NemotronConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=positions, initializer_range=0.2,
    )  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi", "chosen": GOOD, "rejected": BAD},
        {"prompt": json.dumps([USER]), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])},
    ],
)
def test_every_form_of_messages(row: dict[str, Any]) -> None:
    found = preference(row)
    assert isinstance(found, Preference)
    assert found.prompt_messages == 1
    assert [each.messages for each in (found.chosen, found.rejected)] == [(USER, GOOD), (USER, BAD)]  # type: ignore[union-attr]


def test_texts_with_and_without_a_prompt() -> None:
    assert preference({"prompt": "Q: ", "chosen": "yes", "rejected": "no"}) == Preference(
        ("Q: ", "yes"), ("Q: ", "no"), 0
    )
    found = preference({"chosen": "Human: Hi\nAI: Hello", "rejected": "Human: Hi\nAI: Help"})
    assert found == Preference(("Human: Hi\nAI:", " Hello"), ("Human: Hi\nAI:", " Help"), 0)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"chosen": "yes", "rejected": "no"}, "prompt is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "rejected is empty"),
        ({"prompt": "a", "chosen": 3, "rejected": "b"}, "expected texts or lists of messages"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "no message in common"),
        ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, "ends with a message of the user"),
        ({"prompt": [USER, USER], "chosen": [GOOD], "rejected": [BAD]}, "are both of the user"),
    ],
)
def test_what_is_wrong_is_said(row: dict[str, Any], what: str) -> None:
    found = preference(row)
    assert isinstance(found, Bad)
    assert what in found.what


def test_only_the_reply_is_compared(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path / "m"))
    talk = [USER, GOOD, {"role": "user", "content": "So?"}]
    items = [
        preference({"prompt": talk, "chosen": [GOOD], "rejected": [BAD]}),
        preference({"prompt": "Q:", "chosen": " yes", "rejected": " no"}),
    ]
    pairs, notes = encode_pairs(tokenizer, Examples(items, ["a", "b"]), 200, skip_bad=False)  # type: ignore[arg-type]
    assert not notes
    said = [
        tokenizer.decode([label for label in row.token_labels or () if label != IGNORE_INDEX])
        for pair in pairs
        for row in (pair.chosen, pair.rejected)
    ]
    assert said == ["Hello!</s>", "No.</s>", " yes</s>", " no</s>"]
    _, notes = encode_pairs(tokenizer, Examples(items, ["a", "b"]), 30, skip_bad=False)  # type: ignore[arg-type]
    assert notes == ["1 pairs have more than 30 tokens and were skipped, the first: a"]
    with pytest.raises(ConversationError, match="none of 2 pairs can be used"):
        encode_pairs(tokenizer, Examples(items, ["a", "b"]), 3, skip_bad=False)  # type: ignore[arg-type]


def some_pairs(count: int = 5) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)

    def row(length: int) -> Row:
        ids = torch.randint(3, 64, (length,), generator=generator).tolist()
        return Row(tuple(ids), {}, (*[IGNORE_INDEX] * 3, *ids[3:]))

    return [Pair(row(5 + i), row(12 - i), (-3.0 - i, -2.5 + i / 7)) for i in range(count)]


def plain_log_probabilities(model: Any, row: Row) -> tuple[float, int]:
    """Of the labelled tokens of a row alone, by the model's own logits in float64."""
    ids = torch.tensor([row.ids])
    logits = model(input_ids=ids).logits.detach().double().log_softmax(-1)[0, :-1]
    kept = [i for i, label in enumerate((row.token_labels or ())[1:]) if label != IGNORE_INDEX]
    return float(sum(logits[i, row.ids[i + 1]] for i in kept)), len(kept)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_losses_are_those_of_the_papers(kind: Any) -> None:
    model = NemotronForCausalLM(tiny_config(64)).double().eval()
    pairs = some_pairs()
    wanted, likelihood = [], []
    for pair in pairs:
        (chosen, n), (rejected, m) = (plain_log_probabilities(model, row) for row in (pair.chosen, pair.rejected))
        reference = pair.reference or (0.0, 0.0)
        if kind == "sigmoid":
            gap = 0.3 * ((chosen - reference[0]) - (rejected - reference[1]))
            wanted.append(-math.log(1 / (1 + math.exp(-gap))))
        else:
            wanted.append(((chosen - reference[0]) / n - (rejected - reference[1]) / m - 1 / 0.6) ** 2)
        likelihood.append(-chosen / n)
    loss, numbers = PreferenceLoss(kind, beta=0.3)(model, pad_pairs(pairs, 0))
    assert float(loss) == pytest.approx(sum(wanted) / 5, rel=1e-5)
    assert 0 <= float(numbers["accuracy"]) <= 1
    with_sft, _ = PreferenceLoss(kind, beta=0.3, sft_weight=0.5)(model, pad_pairs(pairs, 0))
    assert float(with_sft - loss) == pytest.approx(0.5 * sum(likelihood) / 5, rel=1e-5)


def test_a_step_in_parts_has_the_gradients_of_the_whole() -> None:
    model = NemotronForCausalLM(tiny_config(64)).double()
    stream = PairStream(some_pairs(), 0, seed=3, sequence=64)
    gradients = []
    for batches in (stream.batches(0, 5, 5), stream.batches(0, 5, 2)):
        model.zero_grad()
        for batch in batches:
            PreferenceLoss()(model, batch)[0].backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for one, many in zip(*gradients, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-9)


def test_the_gradient_is_that_of_the_plain_formula() -> None:
    model = NemotronForCausalLM(tiny_config(64)).double()
    pairs = some_pairs(2)
    PreferenceLoss(beta=0.2)(model, pad_pairs(pairs, 0))[0].backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        sums = []
        for row in (pair.chosen, pair.rejected):
            logits = model(input_ids=torch.tensor([row.ids])).logits[0, :-1]
            targets = torch.tensor((row.token_labels or ())[1:])
            sums.append(-F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum"))
        reference = pair.reference or (0.0, 0.0)
        total = total - F.logsigmoid(0.2 * ((sums[0] - reference[0]) - (sums[1] - reference[1])))
    (total / 2).backward()
    for mine, theirs in zip(ours, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-8)


def test_no_row_keeps_a_gradient_of_the_head() -> None:
    """At a large vocabulary one for every row would take more memory than the model."""
    model = NemotronForCausalLM(tiny_config(64))
    head = model.lm_head.weight
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reply_log_probabilities(model, pad_pairs(some_pairs(3), 0))
    assert all(tensor.data_ptr() == head.data_ptr() for tensor in kept if tensor.shape == head.shape)


def test_the_reward_loss_is_that_of_bradley_and_terry() -> None:
    from minitron.heads import NemotronForSequenceClassification

    config = tiny_config(64)
    config.num_labels, config.pad_token_id = 1, 0
    model = NemotronForSequenceClassification(config).double().eval()
    pairs = some_pairs()
    rewards = [
        [float(model(input_ids=torch.tensor([row.ids])).logits) for row in (p.chosen, p.rejected)] for p in pairs
    ]
    wanted = sum(math.log(1 + math.exp(b - a)) for a, b in rewards) / 5
    assert float(RewardLoss()(model, pad_pairs(pairs, 0))[0]) == pytest.approx(wanted, rel=1e-5)


def test_the_reference_is_computed_once(tmp_path: Path) -> None:
    model = NemotronForCausalLM(tiny_config(64)).eval()
    bare = [Pair(pair.chosen, pair.rejected) for pair in some_pairs()]
    found = with_reference(model, bare, 0, tmp_path / "kept.f64")
    for pair in found:
        for row, known in zip((pair.chosen, pair.rejected), pair.reference or (), strict=True):
            assert known == pytest.approx(plain_log_probabilities(model, row)[0], abs=1e-4)
    assert with_reference(None, bare, 0, tmp_path / "kept.f64") == found  # type: ignore[arg-type]
    (tmp_path / "kept.f64").write_bytes(b"short")
    assert with_reference(model, bare, 0, tmp_path / "kept.f64") == found


@pytest.mark.parametrize("task", ["dpo", "reward"])
def test_from_preferences_to_a_model(tmp_path: Path, task: str) -> None:
    folder = folder_of(tmp_path / "base")
    rows = [{"prompt": f"{i}", "chosen": [{"role": "assistant", "content": "aa"}],
             "rejected": [{"role": "assistant", "content": "bb"}]} for i in range(60)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--task", task, "--data", tmp_path / "rows.jsonl", "--lr", "3e-3", "--epochs", "2", "--batch", "8"]
    code, out, err = call(finetune, folder, *options, "--out", tmp_path / "run", "--dtype", "fp32")
    assert code == 0, err
    assert "chosen: <user>0</s><assistant>[[aa</s>]]" in err or "[[aa</s>]]" in err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["scores"]["model"]["accuracy"] == 1.0, out
    assert report["scores"]["longer reply"]["accuracy"] == 0.0
    assert (tmp_path / "reference-cache").exists() == (task == "dpo")
    tokenizer = load_tokenizer(folder)
    if task == "reward":
        check_predicted_rewards(tmp_path / "run" / "model", tokenizer, tmp_path)
    else:
        pairs, _ = encode_pairs(tokenizer, Examples([preference(rows[0])], ["a"]), 64, skip_bad=False)  # type: ignore[arg-type]
        before, after = (
            reply_log_probabilities(NemotronForCausalLM.from_pretrained(place), pad_pairs(pairs, 0))
            for place in (folder, tmp_path / "run" / "model")
        )
        assert float((after[0] - after[1]) - (before[0] - before[1])) > 0.1


def check_predicted_rewards(model: Path, tokenizer: Any, place: Path) -> None:
    """`predict` gives prompt and reply to the model as training did, and refuses a prompt alone or too much."""
    item: Any = preference({"prompt": "7", "chosen": [{"role": "assistant", "content": "aa"}],
                            "rejected": [{"role": "assistant", "content": "bb"}]})  # fmt: skip
    pairs, _ = encode_pairs(tokenizer, Examples([item], ["a"]), 64, skip_bad=False)
    expected = rewards(NemotronForSequenceClassification.from_pretrained(model).eval(), pad_pairs(pairs, 0))
    lines = [{"prompt": "7", "reply": reply} for reply in ("aa", "bb")]
    fields = ["--field", "text=prompt", "--field", "pair=reply", "--out", place / "out.jsonl"]
    (place / "new.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = call(predict, model, place / "new.jsonl", *fields, "--dtype", "fp32")
    assert code == 0, err
    found = [json.loads(line)["value"] for line in (place / "out.jsonl").read_text().splitlines()]
    assert found == pytest.approx(expected.tolist(), abs=1e-5)
    (place / "alone.jsonl").write_text(
        json.dumps({"prompt": "7"}) + "\n" + json.dumps({"prompt": "7" * 99, "reply": "a"})
    )
    code, _, err = call(predict, model, place / "alone.jsonl", "--field", "text=prompt", "--out", place / "no.jsonl")
    assert code == 2
    assert "alone.jsonl, line 1: a reward model judges a reply to a prompt" in err
    lines = [{"text": "7" * 99, "pair": "a"}]
    (place / "long.jsonl").write_text(json.dumps(lines[0]))
    code, _, err = call(predict, model, place / "long.jsonl", "--out", place / "no.jsonl")
    assert code == 2
    assert "long.jsonl, line 1: the prompt '7777" in err
    assert "at most 64 fit" in err
    assert not list(place.glob("no.jsonl*"))
