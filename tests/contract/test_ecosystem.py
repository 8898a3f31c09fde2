"""Pipelines, PEFT, Trainer and Liger, with our classes registered."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from model_samples import build, pair, token_ids
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, pipeline

import minitron
from minitron.outputs import DeferredLogitsOutput

# --- pipelines --------------------------------------------------------------------------------------------------


def saved(folder: Path, name: str, tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> Path:
    build(name, vocab_size=len(tokenizer), pad_token_id=0, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_text_generation_pipeline(registered: None, page_checkpoint: Path) -> None:
    generate = pipeline("text-generation", model=str(page_checkpoint))
    assert type(generate.model) is minitron.NemotronForCausalLM
    prompts = ["our solar system", "the quick brown fox jumps"]
    for batch_size in (1, 2):
        out = generate(prompts, max_new_tokens=5, do_sample=False, batch_size=batch_size)
        for prompt, (got,) in zip(prompts, out, strict=True):
            assert got["generated_text"].startswith(prompt)


def test_text_classification_pipeline(registered: None, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    labels = {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}
    folder = saved(tmp_path, "NemotronForSequenceClassification", tokenizer, **labels)
    classify = pipeline("text-classification", model=str(folder))
    texts = ["the dog", "the lazy dog sleeps in Paris"]
    alone = [classify(text)[0] for text in texts]
    together = classify(texts, batch_size=2)
    for a, b in zip(alone, together, strict=True):
        assert a["label"] == b["label"]
        assert a["label"] in labels["label2id"]
        assert a["score"] == pytest.approx(b["score"], rel=1e-4)


def test_token_classification_pipeline(registered: None, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    folder = saved(tmp_path, "NemotronForTokenClassification", tokenizer)
    tag = pipeline("token-classification", model=str(folder))
    text = "HuggingFace is a company based in Paris"
    assert len(tag(text)) == len(tokenizer(text).input_ids)


def test_feature_extraction_pipeline(registered: None, page_checkpoint: Path) -> None:
    features = pipeline("feature-extraction", model=str(page_checkpoint))("the dog")
    assert torch.tensor(features).shape[-1] == 32


def test_zero_shot_pipeline(registered: None, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    labels = {"id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1}}
    folder = saved(tmp_path, "NemotronForSequenceClassification", tokenizer, **labels)
    out = pipeline("zero-shot-classification", model=str(folder))("the dog sleeps", candidate_labels=["dogs", "towns"])
    assert sum(out["scores"]) == pytest.approx(1.0)


# --- PEFT -------------------------------------------------------------------------------------------------------


def test_lora_knows_its_target_modules__upstreams_must_be_told(registered: None, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = build()
    ids = token_ids()
    before = base(ids).logits
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, task_type="CAUSAL_LM"))
    adapted = {name.split(".lora_A")[0].split(".")[-1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "v_proj"}
    torch.testing.assert_close(model(ids).logits, before)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert merged.generate(ids, max_new_tokens=3).shape == (2, 12)


def test_lora_on_the_head_counts_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    # The loss that skips the logits reads the head's weight, which an adapter is not part of.
    peft = pytest.importorskip("peft")
    monkeypatch.setattr("minitron.heads.CHUNK_VALUES", 96)
    base = build()
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    ids = token_ids()
    out = model(input_ids=ids, labels=ids)
    logits = model(input_ids=ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora" in n)


# --- Trainer ----------------------------------------------------------------------------------------------------


class Repeated(torch.utils.data.Dataset):
    """One short text again and again: the loss must fall."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(5, 21)
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("way", ["plain", "deferred logits", "bf16", "bf16 deferred", "checkpointing"])
def test_trainer(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "deferred" in way:
        monkeypatch.setattr("minitron.heads.CHUNK_VALUES", 96)
        monkeypatch.setattr("minitron.ops.loss.CHUNK_VALUES", 96 * 7)
    model = build().train()
    outputs: list[Any] = []
    model.register_forward_hook(lambda _module, _args, out: outputs.append(type(out)))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        gradient_accumulation_steps=2 if way == "plain" else 1,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=3,
        use_cpu=True,
        bf16="bf16" in way,
        gradient_checkpointing=way == "checkpointing",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Repeated(), eval_dataset=Repeated())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    assert (DeferredLogitsOutput in outputs) == ("deferred" in way)
    predicted = trainer.predict(Repeated())
    assert predicted.predictions.shape == (8, 16, 96)
    assert predicted.metrics["test_loss"] < losses[0]


class Labelled(torch.utils.data.Dataset):
    """Four rows for a head; the number of labels that count differs from row to row."""

    def __init__(self, head: str, num_labels: int) -> None:
        self.head, self.num_labels = head, num_labels

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = token_ids(1, 6, seed=index)[0]
        holes = ids % (index + 2) == 0
        per_row = {1: torch.tensor(float(index)), 2: torch.tensor(index % 2), 3: torch.tensor([1.0, 0.0, index % 2])}
        given = {
            "NemotronForCausalLM": {"labels": ids.masked_fill(holes, -100)},
            "NemotronForSequenceClassification": {"labels": per_row[self.num_labels]},
            "NemotronForQuestionAnswering": {"start_positions": torch.tensor(index), "end_positions": torch.tensor(4)},
            "NemotronForTokenClassification": {"labels": (ids % 2).masked_fill(holes, -100)},
        }
        return {"input_ids": ids, **given[self.head]}


def one_step(model: Any, data: torch.utils.data.Dataset, parts: int, folder: Path) -> torch.Tensor:
    """All parameters after one step on four rows, taken in so many parts."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=4 // parts,
        gradient_accumulation_steps=parts,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=arguments, train_dataset=data).train()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("head", "num_labels", "upstream_is_right"),
    [
        ("NemotronForCausalLM", 2, True),
        ("NemotronForSequenceClassification", 1, False),
        ("NemotronForSequenceClassification", 2, False),
        ("NemotronForSequenceClassification", 3, False),
        ("NemotronForQuestionAnswering", 2, True),
        ("NemotronForTokenClassification", 2, False),
    ],
)
def test_a_step_in_two_parts_is_the_step_in_one__upstreams_heads_double_it(
    head: str, num_labels: int, upstream_is_right: bool, tmp_path: Path
) -> None:
    data = Labelled(head, num_labels)
    right = []
    for side in (0, 1):
        once, twice = (
            one_step(pair(head, pad_token_id=0, num_labels=num_labels)[side], data, parts, tmp_path) for parts in (1, 2)
        )
        right.append(torch.allclose(once, twice, rtol=1e-5, atol=1e-6))
    assert right == [True, upstream_is_right]


# --- Liger ------------------------------------------------------------------------------------------------------


def test_ligers_patch_of_an_instance_leaves_the_numbers() -> None:
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers.model.nemotron import lce_forward

    model = build().eval()
    ids = token_ids()
    expected = model(ids).logits
    model.forward = MethodType(lce_forward, model)
    assert torch.equal(model(ids).logits, expected)
