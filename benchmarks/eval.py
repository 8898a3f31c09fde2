"""Evaluation against lm-evaluation-harness's own Hugging Face backend with upstream transformers.

    python benchmarks/eval.py agreement --data ../shared/datasets     request by request, in fp32
    python benchmarks/eval.py speed --data ../shared/datasets         requests/s with the bundled model
    python benchmarks/eval.py speed-1b --data ../shared/datasets      the same at a shape of 1.0B parameters, random
    python benchmarks/eval.py memory                                  peak at 256,000 tokens of vocabulary

Both answer the same requests on the same weights in turn. The harness's batch size is the best of those tried.
`--smoke` takes a few requests; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from machine import describe, peak_resident
from transformers.models.nemotron import modeling_nemotron as upstream

import minitron
from minitron.evaluate.harness import MinitronLM
from minitron.evaluate.run import FEWSHOT_SEED, quiet_harness
from minitron.evaluate.suites import TaskPlan, build_tasks

# Task, shots, documents. HumanEval grants 1,024 tokens, which the harness refuses for a context of 512.
AGREEMENT = [
    ("mmlu", 5, 114),
    ("mmlu", 0, 114),
    ("hellaswag", 0, 120),
    ("hellaswag", 10, 40),
    ("winogrande", 0, 200),
    ("winogrande", 5, 100),
    ("arc_challenge", 0, 100),
    ("arc_challenge", 25, 40),
    ("gsm8k", 0, 100),
    ("gsm8k", 5, 50),
    ("humaneval", 0, 60),
]
GENERATED = 64
SPEED = [
    ("mmlu", 5, 57),
    ("hellaswag", 0, 100),
    ("arc_challenge", 0, 100),
    ("lambada_openai", 0, 200),
    ("gsm8k", 0, 24),
]
SPEED_1B = [("hellaswag", 0, 4), ("mmlu", 5, 4)]
SHAPE_1B = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}
VOCABULARY_SHAPE = {
    "vocab_size": 256000,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def requests_of(task: str, shots: int, documents: int, data: Path) -> list[Instance]:
    """What the harness asks about the first documents; of MMLU, of two subjects or more."""
    built = build_tasks(TaskPlan(task, shots), data)
    names = list(built)
    if len(names) > 1:
        names = names[:: -(-len(names) // max(2, documents // 2))]
    each = max(1, documents // len(names))
    found: list[Instance] = []
    for name in names:
        built[name].set_fewshot_seed(seed=FEWSHOT_SEED)
        built[name].build_all_requests(limit=each)
        found += built[name].instances
    for request in found:
        if request.request_type == "generate_until":
            request.arguments = (request.args[0], {**request.args[1], "max_gen_toks": GENERATED})
    return found


def pair(dtype: torch.dtype, config: dict | None = None) -> tuple[Any, Any, Any]:
    """Our model, upstream's with the same weights, and the bundled tokenizer."""
    folder = minitron.bundled_model()
    tokenizer = minitron.load().tokenizer
    if config is None:
        ours = minitron.NemotronForCausalLM.from_pretrained(folder, dtype=dtype)
        theirs = upstream.NemotronForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        ours = minitron.NemotronForCausalLM(minitron.NemotronConfig(**config))
        with torch.device("meta"):
            theirs = upstream.NemotronForCausalLM(transformers.NemotronConfig(**config))
        torch.set_default_dtype(before)
        theirs.load_state_dict(ours.state_dict(), assign=True)  # the same memory
        theirs.model.rotary_emb = upstream.NemotronRotaryEmbedding(theirs.config)
    return ours.eval(), theirs.eval(), tokenizer


def answer(lm: Any, requests: list[Instance]) -> list[Any]:
    kind = requests[0].request_type
    return getattr(lm, kind)(requests, disable_tqdm=True)


def agreement(data: Path, smoke: bool) -> dict:
    """Largest difference of log-probabilities, and how many greedy flags, choices and texts differ."""
    ours, theirs, tokenizer = pair(torch.float32)
    rows = []
    for task, shots, documents in AGREEMENT[:2] + AGREEMENT[-1:] if smoke else AGREEMENT:
        requests = requests_of(task, shots, 4 if smoke else documents, data)
        lm = MinitronLM(ours, tokenizer)
        mine = answer(lm, requests)
        other = answer(HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=1), requests)
        row: dict[str, Any] = {"task": task, "shots": shots, "requests": len(requests)}
        row["truncated"] = lm.truncated.total()
        if requests[0].request_type == "loglikelihood":
            row["largest_difference_nats"] = max(abs(a[0] - b[0]) for a, b in zip(mine, other, strict=True))
            row["greedy_flags_differ"] = sum(a[1] != b[1] for a, b in zip(mine, other, strict=True))
            choices = [choices_of(requests, found) for found in (mine, other)]
            row["choices_differ"] = sum(choices[0][doc] != choices[1][doc] for doc in choices[0])
        else:
            row["texts_differ"] = sum(a != b for a, b in zip(mine, other, strict=True))
        rows.append(row)
        print(row, flush=True)
    return {"dtype": "float32", "weights": "bundled model", "generated_tokens": GENERATED, "rows": rows}


def choices_of(requests: list[Instance], found: list[Any]) -> dict[Any, tuple[int, int]]:
    """Per document the best answer, and the best per character of its text, the first of equals."""
    by_document: dict[Any, list[tuple[float, float]]] = {}
    for request, (log_prob, _) in zip(requests, found, strict=True):
        scores = by_document.setdefault((request.task_name, request.doc_id), [])
        scores.append((log_prob, log_prob / max(1, len(request.args[1]))))
    return {
        doc: tuple(max(range(len(scores)), key=lambda i, k=k: scores[i][k]) for k in (0, 1))  # type: ignore[misc]
        for doc, scores in by_document.items()
    }


def speed(data: Path, which: list[tuple[str, int, int]], config: dict | None, dtypes: list[str], rounds: int) -> dict:
    """Requests per second of both, in turn; tokenization is part of it."""
    rows = []
    for dtype in dtypes:
        ours, theirs, tokenizer = pair(getattr(torch, dtype), config)
        for task, shots, documents in which:
            requests = requests_of(task, shots, documents, data)
            works = {f"harness_batch_{n}": HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=n) for n in (1, 8)}
            seconds: dict[str, list[float]] = {name: [] for name in ("minitron", *works)}
            answer(MinitronLM(ours, tokenizer), requests[:8])
            for lm in works.values():
                answer(lm, requests[:8])
            for _ in range(rounds):
                for name in seconds:  # what was answered before is not kept: each adapter has a new cache
                    lm = works.get(name) or MinitronLM(ours, tokenizer)
                    start = time.perf_counter()
                    answer(lm, requests)
                    seconds[name].append(time.perf_counter() - start)
            best = min((name for name in works), key=lambda name: statistics.median(seconds[name]))
            ratios = [b / a for a, b in zip(seconds["minitron"], seconds[best], strict=True)]
            row = {
                "task": task,
                "shots": shots,
                "dtype": dtype,
                "requests": len(requests),
                **{f"{name}_per_s": round(len(requests) / statistics.median(s), 1) for name, s in seconds.items()},
                "ratio_to_best": round(statistics.median(ratios), 2),
                "rounds": rounds,
            }
            rows.append(row)
            print(row, flush=True)
        del ours, theirs
    return {"shape": config or "bundled model", "weights": "random" if config else "bundled", "rows": rows}


def memory(smoke: bool) -> dict:
    """Peak resident memory of a process of its own per program, the same 64 requests of 128 tokens."""
    rows = {}
    for name in ("minitron", "harness"):
        command = [sys.executable, __file__, "memory-of", "--program", name, *(["--smoke"] if smoke else [])]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
    ratio = rows["minitron"]["peak_bytes"] / rows["harness"]["peak_bytes"]
    above = [row["peak_bytes"] - row["before_bytes"] for row in (rows["minitron"], rows["harness"])]
    result = {**rows, "ratio_of_peaks": round(ratio, 3), "ratio_above_weights": round(above[0] / above[1], 3)}
    print(result, flush=True)
    return {"shape": VOCABULARY_SHAPE, "weights": "random", "batch_size": 16, "dtype": "float32", **result}


def memory_of(program: str, smoke: bool) -> None:
    shape = {**VOCABULARY_SHAPE, "vocab_size": 8192} if smoke else VOCABULARY_SHAPE
    torch.manual_seed(0)
    if program == "minitron":
        model: Any = minitron.NemotronForCausalLM(minitron.NemotronConfig(**shape))
    else:
        model = upstream.NemotronForCausalLM(transformers.NemotronConfig(**shape))
    tokenizer = minitron.load().tokenizer
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 4096, (16 if smoke else 64, 128), generator=generator).tolist()
    tokens = [(("", ""), row[:96], row[96:]) for row in ids]
    lm = MinitronLM(model, tokenizer) if program == "minitron" else None
    lm = lm or HFLM(pretrained=model, tokenizer=tokenizer, batch_size=16)  # type: ignore[assignment]
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5", encoding="ascii")  # forget the peak of building the model
    before = peak_resident()
    start = time.perf_counter()
    lm._loglikelihood_tokens(tokens, disable_tqdm=True)  # type: ignore[union-attr]
    seconds = time.perf_counter() - start
    print(json.dumps({"peak_bytes": peak_resident(), "before_bytes": before, "seconds": round(seconds, 2)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["agreement", "speed", "speed-1b", "memory", "memory-of"])
    parser.add_argument("--data", type=Path, default=Path("../shared/datasets"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--program", default="minitron")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    quiet_harness()
    logging.disable(logging.WARNING)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    dtypes = args.dtypes.split(",")
    if args.part == "memory-of":
        memory_of(args.program, args.smoke)
        return
    if args.part == "agreement":
        found = agreement(args.data, args.smoke)
    elif args.part == "speed":
        which = [(task, shots, 4) for task, shots, _ in SPEED] if args.smoke else SPEED
        found = speed(args.data, which, None, dtypes, 1 if args.smoke else args.rounds)
    elif args.part == "speed-1b":
        config = {**SHAPE_1B, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 4096}
        found = speed(args.data, SPEED_1B, config if args.smoke else SHAPE_1B, dtypes, 1 if args.smoke else args.rounds)
    else:
        found = memory(args.smoke)
    if args.out:
        result = {"machine": describe(smoke=args.smoke), args.part: found}
        temporary = Path(tempfile.mkstemp(dir=args.out.parent)[1])
        temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        temporary.replace(args.out)


if __name__ == "__main__":
    main()
