"""Decoding on the CPU against upstream transformers, and its kernels against the bandwidth measured in the same run.

    python benchmarks/decode.py                      the bundled model's shape, seconds
    python benchmarks/decode.py --preset minitron-4b --zeros 0.9 --tokens 12 --rounds 3      11 GB of memory, minutes
    python benchmarks/decode.py --smoke              a small shape; the numbers mean nothing

Weights are random (the preset's shape, a declared share of zeros) unless --model names a checkpoint. The engine and
upstream's `generate` run in turn on the same weights; each round gives one ratio and the median of ratios is reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from machine import describe
from transformers.models.nemotron import modeling_nemotron as upstream

from minitron import NemotronConfig, NemotronForCausalLM
from minitron.engine import measure
from minitron.ops import gemv

SMALL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
}


def upstream_twin(model: NemotronForCausalLM) -> torch.nn.Module:
    """transformers' own model on the same tensors."""
    config = transformers.NemotronConfig(**{**model.config.to_dict(), "dtype": "bfloat16"})
    with torch.device("meta"):
        twin = upstream.NemotronForCausalLM(config)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.model.rotary_emb = upstream.NemotronRotaryEmbedding(config)
    return twin.eval()


def kernels(shapes: list[tuple[int, int]]) -> list[dict]:
    """One thread's GB/s of both kernels on matrices larger than the second-level cache."""
    rows = []
    rng = np.random.default_rng(0)
    for F, D in shapes:
        copies = max(1, (256 << 20) // (F * D * 2))  # so that a matrix has left the cache when its turn comes again
        matrices = [rng.integers(15000, 16500, (F, D), np.uint16) for _ in range(copies)]
        for zeros in (None, 0.0, 0.5, 0.9):
            times = []
            for turn in range(3 * copies):
                w = matrices[turn % copies]
                if zeros is None:
                    x, out = rng.standard_normal((1, D)).astype(np.float32), np.zeros((1, F), np.float32)
                    start = time.perf_counter()
                    gemv.matvec(w, x, out, 0, 0, F)
                else:
                    h = np.where(rng.random((1, F)) < zeros, -1, 1).astype(np.float32)
                    active = np.zeros((1, F), np.int32)
                    counts = np.zeros((1, -(-F // gemv.NEURON_BLOCK)), np.int32)
                    out = np.zeros((1, D), np.float32)
                    start = time.perf_counter()
                    gemv.squared_relu_lists(h, active, counts, 0, F)
                    gemv.down(w, h, active, counts, out, 0, D)
                times.append(time.perf_counter() - start)
            seconds = statistics.median(times[copies:])
            dense = F * D * 2 / seconds / 1e9
            rows.append(
                {
                    "kernel": "matvec" if zeros is None else f"down, {zeros:.0%} zeros",
                    "shape": [F, D],
                    "microseconds": round(seconds * 1e6, 1),
                    "dense_gb_per_s": round(dense, 1),
                    "gb_per_s": round(dense * (1 - (zeros or 0)), 1),
                }
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help="a published shape")
    parser.add_argument("--model", type=Path, help="a checkpoint in place of random weights")
    parser.add_argument("--zeros", type=float, default=0.5, help="declared share of zero MLP neurons")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode in each round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kernels", action="store_true", help="measure the kernels alone as well, one thread")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.model:
        model = NemotronForCausalLM.from_pretrained(args.model).eval()
    else:
        shape = NemotronConfig.preset(args.preset) if args.preset else NemotronConfig(**SMALL)
        model = measure.random_model(shape, args.zeros)
    tokens, rounds = (4, 2) if args.smoke else (args.tokens, args.rounds)
    prompt = torch.randint(model.config.vocab_size, (args.prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    twin = upstream_twin(model)
    found: list[measure.Decoding] = []

    def engine() -> float:
        found.append(measure.decode(model, prompt, tokens))
        return found[-1].seconds_per_token

    works = {
        "engine": engine,
        "upstream": lambda: measure.transformers_seconds_per_token(twin, prompt, tokens),
    }
    for work in works.values():
        work()
    found.clear()
    result: dict = {
        "machine": describe(),
        "weights": str(args.model) if args.model else f"random, {args.zeros:.0%} zeros declared",
        "shape": args.preset or "bundled",
        "prompt_tokens": args.prompt,
        "new_tokens": tokens,
        "rounds": rounds,
    }
    before = measure.read_bandwidth()
    times = measure.interleaved(works, rounds)
    bandwidth = max(before, measure.read_bandwidth())
    seconds = statistics.median(times["engine"])
    dense = measure.weights_of(model).bytes_per_token()
    ratios = [theirs / ours for ours, theirs in zip(times["engine"], times["upstream"], strict=True)]
    result |= {
        "read_bandwidth_gb_per_s": round(bandwidth, 1),
        "engine_tokens_per_s": round(1 / seconds, 2),
        "upstream_tokens_per_s": round(1 / statistics.median(times["upstream"]), 2),
        "times_upstream": round(statistics.median(ratios), 2),
        "times_upstream_range": [round(min(ratios), 2), round(max(ratios), 2)],
        "zero_fraction": round(statistics.median(run.zero_fraction for run in found), 4),
        "engine_gb_per_s": round(statistics.median(run.gb_per_second for run in found), 1),
        "of_dense_floor": round(dense / bandwidth / 1e9 / seconds, 3),
        "prefill_seconds": round(statistics.median(run.prefill_seconds for run in found), 4),
    }
    print(json.dumps(result, indent=2))
    if args.kernels:
        config = model.config
        result["kernels"] = kernels([(config.intermediate_size, config.hidden_size)])
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
