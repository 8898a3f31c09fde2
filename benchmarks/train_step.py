"""A training step on the CPU (forward, backward and AdamW): with torch's attention, with packed attention, compiled.

    python benchmarks/train_step.py --out benchmarks/results/train_step.json
    python benchmarks/train_step.py --smoke          small shapes, seconds; the numbers mean nothing

The shape of the bundled model with random weights; 8 sequences of 512 tokens, packed from documents of 50 to 500 random
tokens; matrix products in bf16 where there is hardware for it. The first two take turns; ratios are medians of the
rounds' own. Compiled layers come last: what they need to compile is told beside.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from machine import describe

from minitron import NemotronConfig
from minitron.data.packing import BlockStream, PackedBlocks
from minitron.data.token_cache import TokenCache
from minitron.ops.packed_attention import packed_attention_in
from minitron.train.inputs import new_model
from minitron.train.machine import keep_freed_memory
from minitron.train.objective import Objective, next_token_loss
from minitron.train.parallel import prepare
from minitron.train.schedule import TrainConfig
from minitron.train.trainer import Trainer
from minitron.world import World


def new_job(smoke: bool, compiled: bool = False) -> Trainer:
    sequence, layers = (128, 1) if smoke else (512, 4)
    shape = NemotronConfig(4096, 256, 1024, layers, 4, 64, 2, max_position_embeddings=sequence)
    random = np.random.default_rng(0)
    lengths = random.integers(50, 500, 200)
    tokens = random.integers(0, 4096, lengths.sum()).astype(np.uint16)
    cache = TokenCache(tokens, np.concatenate([[0], np.cumsum(lengths)]), lengths, "random")
    config = TrainConfig(steps=1000, batch=1 if smoke else 8, sequence=sequence, compile=compiled)
    objective = Objective(new_model(shape, seed=0), next_token_loss)
    prepare(objective, config, World())
    return Trainer(objective, BlockStream([(PackedBlocks(cache, sequence), 1.0)], 0), config, Path())


def step(trainer: Trainer, packed: bool) -> float:
    start = time.perf_counter()
    with packed_attention_in(trainer.model) if packed else nullcontext():
        trainer.step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled layers out")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    keep_freed_memory()
    rounds = 1 if args.smoke else args.rounds
    result: dict = {"machine": describe("cpu", args.smoke), "weights": "random", "rounds": rounds}
    trainer = new_job(args.smoke)
    times = [(step(trainer, False), step(trainer, True)) for _ in range(rounds + 2)][2:]
    plain, packed = (statistics.median(column) for column in zip(*times, strict=True))
    ratios = statistics.quantiles([a / b for a, b in times], n=4) if rounds > 1 else [plain / packed] * 3
    result |= {"tokens": trainer.config.tokens_per_step, "torch_s": plain, "packed_s": packed, "packed_speedup": ratios}
    if not args.no_compile:
        compiled = new_job(args.smoke, compiled=True)
        first = step(compiled, True)
        later = [(step(trainer, True), step(compiled, True)) for _ in range(rounds + 2)][2:]
        result |= {
            "first_compiled_step_s": first,
            "compiled_s": statistics.median(b for _, b in later),
            "compiled_speedup_over_packed": statistics.median(a / b for a, b in later),
        }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
