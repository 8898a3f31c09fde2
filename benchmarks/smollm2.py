"""SmolLM2-135M-Instruct on the CPU: the engine beside llama.cpp and transformers, on the same weights.

    python benchmarks/smollm2.py smollm2 [--tokens 64] [--rounds 3] [--smoke]

Decoding in bf16, int8 and int4 (llama.cpp: BF16, Q8_0, Q4_0), eight texts at a time, a prompt of 512 tokens, and
drafting for itself in int4, for one text and for batches. The engine and llama.cpp run in turn; each round gives one
ratio, and the median of ratios is reported. llama.cpp runs in xllamacpp's prebuilt library, by the times that it
reports itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import minitron
from minitron.bench.peers import GGUF_TYPES
from minitron.checkpoint.gguf.write import write_gguf
from minitron.checkpoint.hf import open_hf
from minitron.engine.engines import open_engine
from minitron.engine.weights import EngineWeights, from_model

FORMATS = ("bf16", "int8", "int4")
BATCH, PROMPT = 8, 512
TEXTS = [
    "Once upon a time, in a small village",
    "The three states of water are",
    "To bake a loaf of bread, first",
    "In 1912 the ship left the harbour of",
    "def fibonacci(n):",
    "The heart is a muscle that",
    "Dear Sir, I am writing to you about",
    "A good teacher is one who",
]
TEXT = "Once upon a time, in a small village at the edge of a forest, there lived a girl who"


def decode_rate(weights: EngineWeights, prompt: list[int], tokens: int, rows: int = 1) -> float:
    """Tokens per second of greedy decoding, over all texts."""
    engine = open_engine(weights, len(prompt) + tokens + 8, rows)
    for slot in range(rows):
        engine.prefill(prompt[:-1], slot)
    slots = list(range(rows))
    last = engine.greedy([prompt[-1]] * rows, 4, slots=slots)[-1]
    start = time.perf_counter()
    engine.greedy(last, tokens, slots=slots)
    seconds = time.perf_counter() - start
    engine.close()
    return rows * tokens / seconds


def prefill_rate(weights: EngineWeights, vocabulary: int) -> float:
    """Tokens per second of a prompt of PROMPT tokens."""
    engine = open_engine(weights, PROMPT + 8)
    ids = torch.randint(vocabulary, (PROMPT,), generator=torch.Generator().manual_seed(0)).tolist()
    start = time.perf_counter()
    engine.prefill(ids)
    engine.step([ids[0]])
    seconds = time.perf_counter() - start
    engine.close()
    return PROMPT / seconds


@contextmanager
def llama_cpp(path: Path, rows: int) -> Iterator[Callable[[Any, int], dict[str, float]] | None]:
    """Asks llama.cpp for a completion and returns its timings; None without xllamacpp."""
    try:
        import xllamacpp  # type: ignore[reportMissingImports]
    except ImportError:
        yield None
        return
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 1024 * rows, rows, True, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)

    def ask(prompt: Any, tokens: int) -> dict[str, float]:
        content = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "cache_prompt": False, "ignore_eos": True}
        body = json.dumps(content).encode()
        request = urllib.request.Request(
            f"{server.listening_address}/completion", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            return json.load(answer)["timings"]

    ask([1], 1)
    yield ask


def compare(model: Any, folder: Path, prompt: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    """Rates of the engine and of llama.cpp for each format, and medians of their ratios."""
    found: dict[str, Any] = {}
    checkpoint = open_hf(folder)
    for format in FORMATS:
        weights = from_model(model, format)  # type: ignore[arg-type]
        open_engine(weights, 8).prepare()
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "model.gguf"
            write_gguf(checkpoint, path, quantization=GGUF_TYPES[format])
            rates: dict[str, list[float]] = {
                name: [] for name in ("decode", "batch", "prefill", "theirs", "theirs_pre")
            }
            with llama_cpp(path, 1) as ask:
                for _ in range(rounds):
                    rates["decode"].append(decode_rate(weights, prompt, tokens))
                    rates["batch"].append(decode_rate(weights, prompt, tokens, BATCH))
                    rates["prefill"].append(prefill_rate(weights, weights.vocab_size))
                    if ask is not None:
                        rates["theirs"].append(ask(prompt, tokens)["predicted_per_second"])
                        ids = [5 + i % 900 for i in range(PROMPT)]
                        rates["theirs_pre"].append(ask(ids, 1)["prompt_per_second"])
        row = {name: round(statistics.median(values), 1) for name, values in rates.items() if values}
        for ours, theirs, name in (("decode", "theirs", "decode_ratio"), ("prefill", "theirs_pre", "prefill_ratio")):
            pairs = [a / b for a, b in zip(rates[ours], rates[theirs], strict=False)]
            if pairs:
                row[name] = round(statistics.median(pairs), 2)
        found[format] = row
    return found


def generate_rates(model: Any, prompt: list[int], tokens: int, rounds: int) -> dict[str, Any]:
    """`generate` with the engine, with its own int4 draft, and of transformers; medians of ratios."""
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    ways = {"engine": {}, "draft": {"draft": "self"}, "transformers": {"engine": "off"}}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, extra in ways.items():
            start = time.perf_counter()
            model.generate(ids, **options, **extra)
            rates[name].append(tokens / (time.perf_counter() - start))
    kept = {name: values[1:] for name, values in rates.items()}  # the first round compiles
    row: dict[str, Any] = {name: round(statistics.median(values), 1) for name, values in kept.items()}
    for name in ("draft", "transformers"):
        row[f"engine_over_{name}"] = median_ratio(kept["engine"], kept[name])
    return row


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Median of the ratios of rounds."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 2)


def draft_rates(model: Any, tokenizer: Any, tokens: int, rounds: int) -> dict[str, Any]:
    """Several texts at once, with and without drafts: tokens per second over all, and medians of ratios."""
    found = {}
    for rows in (1, 2, 4, 8):
        batch = tokenizer(TEXTS[:rows], return_tensors="pt", padding=True, padding_side="left")
        options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        rates: dict[str, list[float]] = {"plain": [], "self": [], "lookup": []}
        for _ in range(rounds + 1):
            for name, values in rates.items():
                start = time.perf_counter()
                model.generate(**batch, **options, draft=None if name == "plain" else name)
                values.append(rows * tokens / (time.perf_counter() - start))
        kept = {name: values[1:] for name, values in rates.items()}
        found[str(rows)] = {
            **{name: round(statistics.median(values), 1) for name, values in kept.items()},
            **{f"{name}_over_plain": median_ratio(kept[name], kept["plain"]) for name in ("self", "lookup")},
        }
    return found


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="the folder of make smollm2")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--drafts", action="store_true", help="drafts alone")
    parser.add_argument("--smoke", action="store_true", help="a few tokens, one round")
    args = parser.parse_args()
    if args.model is None:
        sys.exit("name the folder that `make smollm2` makes")
    if args.smoke:
        args.tokens, args.rounds = 8, 1
    torch.set_num_threads(args.threads)
    model, tokenizer = minitron.load(args.model, device="cpu")
    model.generation_config.eos_token_id = None  # texts of one length; a processor would take time for each token
    prompt = tokenizer(TEXT)["input_ids"]
    folder = Path(args.model)
    found: dict[str, Any] = {"threads": args.threads}
    if not args.drafts:
        found["formats"] = compare(model, folder, prompt, args.tokens, args.rounds)
        found["generate"] = generate_rates(model, prompt, args.tokens, args.rounds)
    found["drafts"] = draft_rates(model, tokenizer, args.tokens, args.rounds)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
