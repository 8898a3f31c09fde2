"""A distillation step of a Llama, Mistral or Qwen against a plain transformers loop with full logits.

    python benchmarks/distill_families.py smollm2                       teacher SmolLM2, student of 75%
    python benchmarks/distill_families.py smollm2 --tokens 2048 --rounds 5
    python benchmarks/distill_families.py --smoke                       a tiny shape; the numbers mean nothing

A step is one forward pass of the teacher, one of the student, the forward KL and the backward pass; the optimizer is
the same for both and is not part of it. Both loops run in turn on the same two models, and the ratio is the median of
the rounds' ratios. Memory is the growth of the peak resident size over its size with the models, in a process of its
own for each loop. The student has random weights and MLP neurons for 75% of the non-embedding parameters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe, peak_resident, reset_peak
from torch.nn import functional as F
from transformers import LlamaConfig

from minitron.checkpoint.hf import read_config
from minitron.data.packing import collate
from minitron.distill.losses import DistillLoss, DistillOptions
from minitron.distill.targets import OnlineTeacher
from minitron.families import family_of
from minitron.family_models import causal_lm_class
from minitron.loading import load
from minitron.prune.architecture import Architecture
from minitron.shapes import describe as shape_of

SHARE = 0.75
SMOKE = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2}
SMOKE |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def student_config(config: Any) -> Any:
    """The teacher's configuration with so few neurons that SHARE of the non-embedding parameters stay."""
    shape, whole = shape_of(config), Architecture.of(config)
    spare = (1 - SHARE) * shape.num_non_embedding_parameters()
    per_neuron = shape.parameter_counts()["mlp"] / shape.ffn
    ffn = round((shape.ffn - spare / per_neuron) / 8) * 8
    return Architecture(whole.layers, whole.hidden, whole.heads, whole.groups, ffn).config(config)


def models(folder: str | None, dtype: torch.dtype) -> tuple[Any, Any]:
    """Teacher and student."""
    torch.manual_seed(0)
    if folder is None:
        config: Any = LlamaConfig(**SMOKE)
        teacher = causal_lm_class(family_of(config))(config)
    else:
        config, teacher = read_config(Path(folder)), load(folder, dtype=dtype, device="cpu").model
    made = student_config(config)
    student = causal_lm_class(family_of(made))(made)
    return teacher.to(dtype).eval().requires_grad_(False), student.to(dtype).train()


def loops(teacher: Any, student: Any, tokens: int) -> dict[str, Callable[[], float]]:
    """The two loops by name; each call is a step and returns the loss."""
    ids = torch.randint(3, student.config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))
    batch = collate([[ids.numpy()]], tokens)
    ours = DistillLoss(OnlineTeacher(teacher), DistillOptions(), student.config)

    def minitron() -> float:
        loss, _ = ours(student, batch)
        loss.backward()
        return loss.item()

    def full_logits() -> float:
        """As in the distillation examples of transformers: whole logits of both, KL in fp32."""
        with torch.no_grad():
            t = teacher(batch.input_ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        s = student(batch.input_ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
        loss = F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
        loss.backward()
        return loss.item()

    return {"minitron": minitron, "full logits": full_logits}


def memory(folder: str | None, dtype: torch.dtype, tokens: int, name: str) -> dict[str, Any]:
    """Peak memory of a step of one loop, over that of the models with gradients."""
    teacher, student = models(folder, dtype)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = loops(teacher, student, tokens)[name]
    reset_peak()
    before = peak_resident()
    step()
    return {"loop": name, "bytes_over_the_models": peak_resident() - before}


def speed(folder: str | None, dtype: torch.dtype, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of both loops in turn."""
    teacher, student = models(folder, dtype)
    steps = loops(teacher, student, tokens)
    times: dict[str, list[float]] = {name: [] for name in steps}
    losses = {}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            student.zero_grad(set_to_none=True)
            start = time.perf_counter()
            losses[name] = step()
            times[name].append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(times["full logits"][1:], times["minitron"][1:], strict=True)]
    return {
        "parameters": [sum(p.numel() for p in model.parameters()) for model in (teacher, student)],
        "seconds": {name: statistics.median(values[1:]) for name, values in times.items()},
        "speedup": statistics.median(ratios),
        "losses": losses,
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="the teacher's folder")
    parser.add_argument("--tokens", type=int, default=1024, help="in one step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.model, args.tokens, args.rounds = None, 32, 1
    elif args.model is None:
        sys.exit("name the teacher's folder, such as the one that `make smollm2` makes")
    dtype = getattr(torch, args.dtype)
    if args.case:
        print(json.dumps(memory(args.model, dtype, args.tokens, args.case)))
        return
    result: dict[str, Any] = {"machine": describe("cpu", args.smoke), "tokens": args.tokens, "dtype": args.dtype}
    result |= speed(args.model, dtype, args.tokens, args.rounds)
    rows = []
    for name in ("minitron", "full logits"):
        if args.smoke:
            rows.append(memory(None, dtype, args.tokens, name))
            continue
        command = [sys.executable, __file__, args.model, "--case", name, "--tokens", str(args.tokens)]
        done = subprocess.run([*command, "--dtype", args.dtype], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    result["memory"] = rows
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
