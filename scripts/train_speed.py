"""Measure training speed of small shapes on this machine, as in docs/training.md: `python scripts/train_speed.py`.

Packed documents of 50 to 500 random tokens, vocabulary 4096, 16 sequences of 512 tokens a step, bf16 where there is
hardware for it. Prints the best of five steps (forward and backward; AdamW adds about one in a hundred).
"""

from __future__ import annotations

import platform

import numpy as np
import torch

from minitron import NemotronConfig
from minitron.data.packing import BlockStream, PackedBlocks
from minitron.data.token_cache import TokenCache
from minitron.train.inputs import new_model
from minitron.train.loop import estimate, next_token_loss
from minitron.train.machine import keep_freed_memory
from minitron.train.schedule import TrainConfig

VOCABULARY, SEQUENCE = 4096, 512
# layers, hidden size, MLP, query heads, key/value heads, head dim
SHAPES = (
    (4, 256, 1024, 4, 2, 64),
    (6, 256, 1024, 4, 2, 64),
    (6, 256, 1024, 8, 2, 32),
    (8, 256, 768, 4, 2, 64),
    (6, 320, 1280, 5, 1, 64),
)


def random_stream() -> BlockStream:
    """Documents of random tokens."""
    random = np.random.default_rng(0)
    lengths = random.integers(50, 500, 200)
    tokens = random.integers(0, VOCABULARY, lengths.sum()).astype(np.uint16)
    cache = TokenCache(tokens, np.concatenate([[0], np.cumsum(lengths)]), lengths, "random")
    return BlockStream([(PackedBlocks(cache, SEQUENCE), 1.0)], seed=0)


def main() -> None:
    """Command line."""
    keep_freed_memory()
    settings = TrainConfig(steps=1, batch=16, sequence=SEQUENCE)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| layers, hidden, MLP, heads, kv heads, head dim | parameters | tokens/s |\n| --- | --- | --- |")
    for shape in SHAPES:
        layers, hidden, intermediate, heads, groups, head_dim = shape
        config = NemotronConfig(
            VOCABULARY, hidden, intermediate, layers, heads, head_dim, groups, max_position_embeddings=SEQUENCE
        )
        model = new_model(config, seed=0)
        seconds = min(estimate(model, random_stream(), settings, next_token_loss).seconds_per_step for _ in range(5))
        print(
            f"| {shape} | {config.num_parameters() / 1e6:.2f}M | {settings.tokens_per_step / seconds:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
