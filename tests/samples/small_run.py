"""A small training run in a process of its own, for tests that kill it: `python small_run.py RUN_FOLDER STEPS`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from minitron import NemotronConfig, NemotronForCausalLM
from minitron.data.packing import BlockStream, PackedBlocks
from minitron.data.token_cache import TokenCache
from minitron.train.loop import Result, train
from minitron.train.schedule import TrainConfig


def small_stream(seed: int = 0, sequence: int = 16, documents: int = 60) -> BlockStream:
    """Documents of 4 to 15 tokens from a vocabulary of 50, with structure that can be learned."""
    random = np.random.default_rng(7)
    lengths = random.integers(4, 16, documents)
    rows = [(np.arange(n) * random.integers(1, 4) + random.integers(0, 9)) % 50 for n in lengths]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    cache = TokenCache(np.concatenate(rows).astype(np.uint16), starts, lengths * 3, "small" * 4)
    return BlockStream([(PackedBlocks(cache, sequence), 1.0)], seed)


def small_model(dropout: float = 0.0) -> NemotronForCausalLM:
    """A model of 10 thousand parameters."""
    torch.manual_seed(0)
    config = NemotronConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        attention_dropout=dropout,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    return NemotronForCausalLM(config)


def small_config(steps: int, **changes: object) -> TrainConfig:
    """Saves at every step, so that a kill at any moment is likely to hit the writing of a checkpoint."""
    values = {"steps": steps, "batch": 4, "micro_batch": 2, "sequence": 16, "lr": 3e-3, "warmup": 5, "save_every": 1}
    return TrainConfig(**{**values, "eval_every": 0, "keep": 2, **changes})  # type: ignore[arg-type]


def small_run(run: Path, steps: int) -> Result:
    """Train or continue; with dropout, so that the random state matters too."""
    return train(small_model(dropout=0.1), small_stream(), small_config(steps), run, quiet=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    small_run(Path(sys.argv[1]), int(sys.argv[2]))
    print("finished")
