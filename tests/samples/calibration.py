"""Checkpoints and calibration blocks for tests of pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from model_samples import build

from minitron import NemotronForCausalLM
from minitron.data.packing import Batch, PackedBlocks, collate
from minitron.data.token_cache import TokenCache


def saved(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> NemotronForCausalLM:
    """A small random model, written to `folder`; returned in float64."""
    model = build(**{"num_hidden_layers": 3, **overrides}).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    return model.double()


def documents(count: int = 9, longest: int = 30, vocab: int = 96, seed: int = 0) -> TokenCache:
    """Random documents of different lengths."""
    random = np.random.default_rng(seed)
    lengths = random.integers(4, longest, count)
    tokens = random.integers(5, vocab, lengths.sum()).astype(np.uint16)
    return TokenCache(tokens, np.concatenate([[0], np.cumsum(lengths)]), lengths.astype(np.int64), f"seed {seed}")


def batch(block: int = 20, **options: Any) -> Batch:
    """Packed blocks of random documents, some of them with padding."""
    packed = PackedBlocks(documents(**options), block)
    made = collate([packed.pieces(i) for i in range(len(packed))], block)
    assert (made.labels[:, -1] == -100).any()
    assert (made.position_ids[:, 1:-1] == 0).any()
    return made
