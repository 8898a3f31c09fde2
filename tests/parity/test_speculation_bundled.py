"""The bundled model's greedy text with and without speculation, over real prompts of several kinds."""

from __future__ import annotations

import gzip
import itertools
import json
import lzma
from pathlib import Path

import pytest
import torch
from checkpoint_samples import data_folder
from forced_drafts import force_drafts

import minitron

NEW_TOKENS = 40

SOURCES = {
    "books/storybooks_en.jsonl.gz": (gzip.open, "text", 60),
    "books/heldout.jsonl.xz": (lzma.open, "text", 20),
    "gsm8k/test.jsonl": (open, "question", 20),
    "humaneval/HumanEval.jsonl.gz": (gzip.open, "prompt", 10),
}


def some_texts(folder: Path) -> list[str]:
    """Beginnings of stories, novels, questions and code."""
    texts = []
    for name, (opener, key, count) in SOURCES.items():
        with opener(folder / name, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)[key][:500] for line in itertools.islice(lines, count)]
    return texts


def test_speculation_leaves_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    force_drafts(monkeypatch)
    folder = data_folder()
    if folder is None:
        pytest.skip("the data folder is not at hand (MINITRON_DATA)")
    model, tokenizer = minitron.load()
    drafts = {"lookup": "lookup", "fp32 twin": minitron.load(dtype="fp32").model, "child": "default"}
    texts, kept = some_texts(folder), dict.fromkeys(drafts, 0)
    assert len(texts) >= 100
    for number, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text)["input_ids"][:120]])
        how = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
        plain = model.generate(ids, **how)
        for name, draft in drafts.items():
            if name == "lookup" or number % 4 == 0:
                assert torch.equal(model.generate(ids, draft=draft, **how), plain), (name, text[:80])
                kept[name] += model.last_generation.speculation.kept
    assert all(kept.values()), kept
