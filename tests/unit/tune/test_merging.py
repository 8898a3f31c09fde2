"""Adapters after training: merged, alone and shared by a server they compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from text_checkpoint import save_byte_tokenizer
from verb_calls import call

from minitron import NemotronConfig, NemotronForCausalLM, load
from minitron.checkpoint.lora import read_low_rank
from minitron.cli.finetune import finetune
from minitron.serve.adapters import with_adapter
from minitron.tokenizer import load_tokenizer
from minitron.train.adapters import choose_trained
from minitron.train.run_folder import TrainError
from minitron.tune.merging import merging_error

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_merged_alone_and_shared_the_adapters_give_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINITRON_CACHE", str(tmp_path / "cache"))
    save_byte_tokenizer(tmp_path / "base")
    tokenizer: Any = load_tokenizer(tmp_path / "base")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    NemotronForCausalLM(config).save_pretrained(tmp_path / "base")
    rows = [[{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "aa"}] for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    options = ["--task", "chat", "--data", tmp_path / "rows.jsonl", "--tune", "lora", "--lora-rank", "4"]
    options += ["--lr", "0.05", "--steps", "4", "--batch", "4", "--dtype", "fp32", "--out", tmp_path / "run"]
    code, _, err = call(finetune, tmp_path / "base", *options)
    assert code == 0, err
    found = json.loads((tmp_path / "run/report.json").read_text())["merge"]
    assert 0 <= found["largest_difference"] < 1e-4 < found["largest_logit"]
    assert "merged: logits differ from those with adapters by at most" in err
    ids = torch.tensor([[5, 9, 30, 17, 40]])
    base, merged, alone = (load(tmp_path / name).model for name in ("base", "run/model", "run/adapter"))
    parts = read_low_rank(tmp_path / "run/adapter", dict(base.named_parameters()))
    with torch.no_grad():
        plain, *others = (m(input_ids=ids).logits for m in (base, merged, alone, with_adapter(base, parts)))
    for logits in others:
        torch.testing.assert_close(logits, others[0], rtol=1e-4, atol=1e-4)
    assert float((others[0] - plain).abs().max()) > 0.1


def test_another_model_is_noticed(tmp_path: Path) -> None:
    config = NemotronConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=8,
    )  # fmt: skip
    one, two = (NemotronForCausalLM(config) for _ in range(2))
    two.save_pretrained(tmp_path)
    error, largest = merging_error(one, tmp_path, torch.tensor([[1, 2, 3]]))
    assert 0.01 < error < 10 * largest
    assert merging_error(two, tmp_path, torch.tensor([[1, 2, 3]]))[0] == 0


def test_adapters_on_packed_weights_are_refused() -> None:
    with pytest.raises(TrainError, match=r"'qlora'.* is not built .*; use lora"):
        choose_trained(torch.nn.Linear(1, 1), "qlora")
