"""Forward, and forward + backward, against upstream transformers; peak memory of a training step at 256k vocabulary.

    python benchmarks/model_speed.py                 about ten minutes on 2 cores
    python benchmarks/model_speed.py --smoke         a small shape, seconds; the numbers mean nothing

The two models run in turn in one process, on the same random weights; each round gives one ratio, and the median of
the ratios is reported with their quartiles. Memory is the peak resident size of a process of its own per model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from machine import describe, peak_resident
from transformers.models.nemotron import modeling_nemotron as upstream

import minitron

SHAPES = {
    "124M": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
# 256,000 tokens at this width are 131M parameters in the two embeddings and 6M in the layers.
VOCABULARY_SHAPE = {
    "vocab_size": 256000,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build(which: str, shape: dict, dtype: torch.dtype, device: str):
    torch.manual_seed(0)
    if which == "minitron":
        model = minitron.NemotronForCausalLM(minitron.NemotronConfig(**shape))
    else:
        model = upstream.NemotronForCausalLM(transformers.NemotronConfig(**shape))
    return model.to(device=device, dtype=dtype)


def timed(work, device: str) -> float:
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(shape: dict, dtype: torch.dtype, batch: int, tokens: int, train: bool, rounds: int, device: str) -> dict:
    models = {name: build(name, shape, dtype, device) for name in ("upstream", "minitron")}
    models["minitron"].load_state_dict(models["upstream"].state_dict())
    ids = torch.randint(0, shape["vocab_size"], (batch, tokens), device=device)

    def step(model) -> None:
        if not train:
            with torch.inference_mode():
                model(ids, use_cache=False)
            return
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    times: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        model.train(train)
        step(model)  # warm-up
        times[name].clear()
    for round_ in range(rounds):
        # Each goes first in every other round, so that neither always runs on a warmer machine.
        for name in sorted(models, reverse=bool(round_ % 2)):
            times[name].append(timed(lambda name=name: step(models[name]), device))
    ratios = [ours / theirs for ours, theirs in zip(times["minitron"], times["upstream"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": batch,
        "tokens": tokens,
        "pass": "forward+backward" if train else "forward",
        "minitron_seconds": round(statistics.median(times["minitron"]), 4),
        "upstream_seconds": round(statistics.median(times["upstream"]), 4),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "rounds": rounds,
    }


def peak_memory(which: str, shape: dict, tokens: int, dtype: str) -> dict:
    """One training step in a process of its own."""
    task = json.dumps({"which": which, "shape": shape, "tokens": tokens, "dtype": dtype})
    out = subprocess.run([sys.executable, __file__, "--memory-of", task], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def memory_of(task: dict) -> None:
    model = build(task["which"], task["shape"], getattr(torch, task["dtype"]), "cpu")
    ids = torch.randint(0, task["shape"]["vocab_size"], (1, task["tokens"]))
    before = peak_resident()
    start = time.perf_counter()
    model(ids, labels=ids, use_cache=False).loss.backward()
    elapsed = time.perf_counter() - start
    print(json.dumps({"peak_bytes": peak_resident(), "before_step_bytes": before, "seconds": round(elapsed, 2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if args.memory_of:
        memory_of(json.loads(args.memory_of))
        return
    name, rounds = ("tiny", 2) if args.smoke else ("124M", args.rounds)
    result: dict = {
        "machine": describe(args.device, args.smoke),
        "weights": "random",
        "shape": {name: SHAPES[name]},
        "speed": [],
    }
    dtypes = [torch.float32] if args.smoke else [torch.float32, torch.bfloat16]
    cases = [(1, 32, False)] if args.smoke else [(1, 512, False), (4, 128, False), (1, 1, False)]
    cases.append((1, 32 if args.smoke else 512, True))
    for dtype in dtypes:
        for batch, tokens, train in cases:
            # A single token takes milliseconds: more rounds, for the same certainty.
            times = rounds * 10 if tokens == 1 else rounds
            row = compare(SHAPES[name], dtype, batch, tokens, train, times, args.device)
            result["speed"].append(row)
            print(
                f"{row['dtype']:9} {row['batch']} x {row['tokens']:4} {row['pass']:17} "
                f"ours {row['minitron_seconds']:.4f} s, upstream {row['upstream_seconds']:.4f} s, "
                f"ratio {row['ratio_median']:.3f} [{row['ratio_quartiles'][0]:.3f}, {row['ratio_quartiles'][1]:.3f}]",
                flush=True,
            )
    if args.device == "cpu":
        shape = {**VOCABULARY_SHAPE, "vocab_size": 4096} if args.smoke else VOCABULARY_SHAPE
        result["memory"] = {"shape": shape, "rows": []}
        for dtype in ("float32", "bfloat16"):
            rows = {
                which: peak_memory(which, shape, 64 if args.smoke else 2048, dtype)
                for which in ("minitron", "upstream")
            }
            ratio = rows["minitron"]["peak_bytes"] / rows["upstream"]["peak_bytes"]
            result["memory"]["rows"].append({"dtype": dtype, **rows, "peak_ratio": round(ratio, 3)})
            print(
                f"{dtype:9} step at {shape['vocab_size']} tokens of vocabulary: "
                f"ours {rows['minitron']['peak_bytes'] / 1e9:.2f} GB in {rows['minitron']['seconds']} s, "
                f"upstream {rows['upstream']['peak_bytes'] / 1e9:.2f} GB in {rows['upstream']['seconds']} s, "
                f"memory ratio {ratio:.3f}",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
