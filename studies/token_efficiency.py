"""How many tokens does a model of half the size need: pruned and distilled, or trained from nothing?

Arms, all of one shape (the bundled model with its MLP cut from 1024 to 320 neurons, half of its parameters without
embeddings): random weights with cross-entropy (the usual way), random weights with distillation, the teacher pruned at
random with distillation, pruned by importance with cross-entropy, and pruned by importance with distillation (the
paper's way). The learning rate of each is taken from a small grid. Each length is a run of its own, with its own decay.

    python studies/token_efficiency.py TEXTS
"""

from __future__ import annotations

from typing import Any

import arms
from arms import Arm, Bench

from minitron import NemotronConfig

SHAPE = {"intermediate_size": 320}
GRID_TOKENS = 250_000
SHORT = (125_000, 250_000, 500_000)
LONG = (500_000, 1_000_000, 2_000_000, 4_000_000, 8_000_000)
"""Lengths of the runs from random weights with cross-entropy."""


def shape(bench: Bench) -> NemotronConfig:
    """The student's configuration."""
    return NemotronConfig.from_dict({**bench.teacher_config.to_dict(), **SHAPE})


def scratch(bench: Bench, lr: float, tokens: int, seed: int) -> dict[str, Any]:
    """One run from random weights with cross-entropy."""
    config = shape(bench)
    flops = 3 * config.flops_per_token(bench.sequence // 2)
    return bench.run(Arm("scratch-ce", "random", "ce", lr, tokens, seed), arms.random_start(config), None, flops)


if __name__ == "__main__":
    options = arms.arguments(__doc__)
    bench = Bench(options.texts, options.runs, options.quick)
    if options.only and "scratch-ce" in options.only:
        for tokens, lr in ((500_000, 2e-3), (500_000, 4e-3), (1_000_000, 2e-3), (2_000_000, 2e-3), (4_000_000, 2e-3)):
            scratch(bench, lr, tokens, 0)
