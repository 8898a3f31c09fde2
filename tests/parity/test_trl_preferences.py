"""DPO and IPO against TRL's trainer: the same losses and gradients for the same pairs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from text_checkpoint import save_byte_tokenizer
from trl import DPOConfig, DPOTrainer

from minitron import NemotronConfig, NemotronForCausalLM
from minitron.data.examples import Examples
from minitron.data.preferences import preference
from minitron.tokenizer import load_tokenizer
from minitron.tune.pairs import encode_pairs, pad_pairs
from minitron.tune.preferences import PreferenceLoss, with_reference


def model_of(vocabulary: int, seed: int) -> NemotronForCausalLM:
    torch.manual_seed(seed)
    config = NemotronConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    return NemotronForCausalLM(config).float()


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_losses_and_gradients_are_those_of_trl(tmp_path: Path, kind: Any) -> None:
    save_byte_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    model, before = (model_of(len(tokenizer), seed) for seed in (1, 0))
    letters = random.Random(0)

    def text(most: int) -> str:
        return " " + "".join(letters.choices("abc d", k=letters.randrange(2, most)))

    rows = [{"prompt": "Q:" + text(9), "chosen": text(30) + "x", "rejected": text(30) + "y"} for _ in range(6)]
    pairs, _ = encode_pairs(tokenizer, Examples(list(map(preference, rows)), ["row"] * 6), 128, skip_bad=False)  # type: ignore[arg-type]
    batch = pad_pairs(with_reference(before.eval(), pairs, 0, tmp_path / "reference.f64"), 0)
    ours, numbers = PreferenceLoss(kind, beta=0.25)(model, batch)
    ours.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()

    settings = DPOConfig(
        output_dir=str(tmp_path / "trl"), loss_type=[kind], beta=0.25, per_device_train_batch_size=6, use_cpu=True,
        report_to=[], max_length=128, disable_dropout=True, gradient_checkpointing=False, bf16=False,
    )  # fmt: skip
    trainer = DPOTrainer(
        model, before, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    theirs: Any = trainer.compute_loss(model, next(iter(trainer.get_train_dataloader())))
    torch.testing.assert_close(ours.detach(), theirs.detach().to(ours.dtype), rtol=1e-5, atol=1e-6)
    theirs.backward()
    for mine, other in zip(gradients, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-4, atol=2e-6)
    assert 0 < float(numbers["accuracy"]) < 1
