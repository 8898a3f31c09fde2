"""Prompts of several lengths, and batches of several texts, on the CPU: the engine beside llama.cpp.

    python benchmarks/prompts.py                                       prompts of the bundled model, five formats
    python benchmarks/prompts.py --model smollm2 --lengths 32,512      of a checkpoint
    python benchmarks/prompts.py --preset minitron-4b --layers 4       random weights in a published shape
    python benchmarks/prompts.py --batches 2,4,8,16,32                 several texts at once, each token for all of them
    python benchmarks/prompts.py --smoke                               a small shape; the numbers mean nothing

Both run in turn on the same weights (llama.cpp on a GGUF file of the matching type); each round gives one ratio, and
the median of ratios is reported. A prompt's time is from the call to its first token. A batch's is that of decoding
only, greedily, over all its texts. Beside them stand the multiplications and additions of the weights per second, and
what the machine gives: torch's matrix products in fp32, and its read bandwidth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import SMALL
from machine import seconds

import minitron
from minitron import NemotronConfig
from minitron.bench import measure
from minitron.bench.peers import LlamaPeer, llama_peer
from minitron.engine.engines import open_engine
from minitron.engine.weights import EngineWeights, from_model

PAUSE = 0.05
"""Seconds between two measurements: a short prompt takes less time than threads spin after the one before."""
TEXT = 32
"""Tokens of a batch's prompts."""


def random_tokens(count: int, vocabulary: int, seed: int = 0) -> list[int]:
    """The same on every machine."""
    return torch.randint(3, vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def prompt_seconds(weights: EngineWeights, prompt: list[int]) -> float:
    """From the call to the first token."""
    engine = open_engine(weights, len(prompt) + 8)
    try:
        start = time.perf_counter()
        engine.prefill(prompt[:-1], more=True)
        engine.greedy(prompt[-1:], 1)
        return time.perf_counter() - start
    finally:
        engine.close()


def batch_seconds(weights: EngineWeights, prompts: list[list[int]], tokens: int) -> float:
    """For each token of all texts together."""
    engine = open_engine(weights, len(prompts[0]) + tokens + 8, len(prompts))
    try:
        slots = list(range(len(prompts)))
        for slot, prompt in enumerate(prompts):
            engine.prefill(prompt[:-1], slot)
        last = engine.greedy([prompt[-1] for prompt in prompts], 2, slots=slots)[-1]
        start = time.perf_counter()
        engine.greedy(last, tokens, slots=slots)
        return (time.perf_counter() - start) / tokens
    finally:
        engine.close()


def machine(smoke: bool) -> dict[str, float]:
    """What the machine gives: GB/s of a sum over memory, and GFLOP/s of torch's matrix product in fp32."""
    n = 128 if smoke else 1024
    a = torch.randn(n, n)
    return {
        "read_bandwidth_gb_per_s": 0.0 if smoke else round(measure.read_bandwidth(), 1),
        "matmul_float32_gflop_per_s": round(2 * n**3 / seconds(lambda: a @ a) / 1e9, 1),
    }


class LlamaBatch:
    """llama.cpp with several sequences in one context, on the model that a `LlamaPeer` has loaded."""

    def __init__(self, peer: LlamaPeer, texts: int, capacity: int) -> None:
        self._cpp, self._llama = peer._library, peer._llama
        params = self._cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = texts * capacity, texts
        params.n_batch = params.n_ubatch = max(TEXT, texts)
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        self._context = self._cpp.llama_init_from_model(self._llama._model.model, params)
        self._batch = self._cpp.llama_batch_init(params.n_batch, 0, 1)

    def _append(self, tokens: list[int], positions: list[int], texts: list[int]) -> list[int]:
        """Append tokens to texts, and return the most probable next one after each."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, (token, position, text) in enumerate(zip(tokens, positions, texts, strict=True)):
            batch.token[index], batch.pos[index] = token, position
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, text, True
        assert self._cpp.llama_decode(self._context, batch) == 0
        rows = (self._cpp.llama_get_logits_ith(self._context, index) for index in range(len(tokens)))
        return [int(np.ctypeslib.as_array(row, (self._llama.n_vocab(),)).argmax()) for row in rows]

    def seconds(self, prompts: list[list[int]], tokens: int) -> float:
        """For each token of all texts together."""
        self._cpp.llama_memory_clear(self._cpp.llama_get_memory(self._context), True)
        texts = list(range(len(prompts)))
        last = [
            self._append(prompt, list(range(len(prompt))), [text] * len(prompt))[-1]
            for text, prompt in enumerate(prompts)
        ]
        for step in range(tokens + 2):
            if step == 2:
                start = time.perf_counter()
            last = self._append(last, [len(prompts[0]) + step] * len(prompts), texts)
        return (time.perf_counter() - start) / tokens

    def close(self) -> None:
        """Free its memory."""
        self._cpp.llama_batch_free(self._batch)
        self._cpp.llama_free(self._context)


def compared(works: dict[str, Callable[[], float]], rounds: int, texts: int, flop: float) -> dict[str, Any]:
    """Tokens per second of each and the median of ratios; `texts` tokens take the seconds of a work."""
    for work in works.values():
        work()
    found = measure.interleaved(works, rounds, PAUSE)
    row: dict[str, Any] = {name: round(texts / statistics.median(times), 1) for name, times in found.items()}
    row["gflop_per_s"] = round(flop * row["engine"] / 1e9, 1)
    if "llama.cpp" in found:
        pairs = zip(found["engine"], found["llama.cpp"], strict=True)
        row["times"] = round(statistics.median(theirs / ours for ours, theirs in pairs), 2)
    return row


def rows_of(model: Any, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each format and length, or number of texts."""
    lengths, sizes = ([int(x) for x in text.split(",") if x] for text in (args.lengths, args.batches or ""))
    longest, rows = TEXT + args.tokens + 8 if sizes else max(lengths) + 8, []
    for format in args.formats.split(","):
        weights = from_model(model, format)
        flop = 2 * sum(m.shape[0] * m.shape[1] for layer in weights.layers for m in layer.matrices)
        with llama_peer(model, format, longest) as peers:
            for count in sizes or lengths:
                works, batch = {}, None
                if sizes:
                    prompts = [random_tokens(TEXT, weights.vocab_size, seed) for seed in range(count)]
                    works["engine"] = lambda w=weights, p=prompts: batch_seconds(w, p, args.tokens)
                    for peer in peers.values():
                        batch = LlamaBatch(peer, count, longest)  # type: ignore[arg-type]
                        works["llama.cpp"] = lambda b=batch, p=prompts: b.seconds(p, args.tokens)
                else:
                    prompt = random_tokens(count, weights.vocab_size)
                    works["engine"] = lambda w=weights, p=prompt: prompt_seconds(w, p)
                    for key, peer in peers.items():
                        works[key] = lambda b=peer, p=prompt: b.run(p, 1).prefill_seconds
                row = {"weights": name, "format": format, "texts" if sizes else "prompt": count}
                rows.append(row | compared(works, args.rounds, count, flop))
                if batch is not None:
                    batch.close()
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Print a JSON object for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="a checkpoint; the bundled model if neither it nor a preset is given"
    )
    parser.add_argument("--preset", help="random weights in a published shape")
    parser.add_argument("--layers", type=int, help="with --preset: fewer layers and as much less vocabulary")
    parser.add_argument("--zeros", type=float, default=0.5, help="with --preset: declared share of zero MLP neurons")
    parser.add_argument("--formats", default="bf16,fp32,bf12,int8,int4")
    parser.add_argument("--lengths", default="16,32,64,128,512,2048", help="tokens of prompts")
    parser.add_argument("--batches", help="numbers of texts, with commas: batches instead of prompts")
    parser.add_argument("--tokens", type=int, default=32, help="tokens of each text of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    if args.smoke:
        args.lengths, args.tokens, args.rounds = "16,40", 4, 1
        args.batches = args.batches and "2,5"
        args.formats = "bf16" if args.formats == parser.get_default("formats") else args.formats
        model, name = measure.random_model(NemotronConfig(**SMALL)), "small shape"
    elif args.preset:
        config = NemotronConfig.preset(args.preset)
        config = config if args.layers is None else measure.shortened(config, args.layers)
        model, name = measure.random_model(config, args.zeros), f"{args.preset}, {config.num_hidden_layers} layers"
    else:
        model, name = minitron.load(args.model).model, str(args.model or "bundled model")
    result: dict[str, Any] = {"threads": torch.get_num_threads(), "machine": machine(args.smoke)}
    print(json.dumps(result["machine"]), flush=True)
    result["rows"] = rows_of(model, name, args)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
