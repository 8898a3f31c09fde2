"""Sampling, logits processors, stopping criteria and drafts beside greedy decoding: whole calls of `generate`, in turn.

    python benchmarks/sampling.py                    the bundled model
    python benchmarks/sampling.py --widen 16         the same function with 256 times the weights
    python benchmarks/sampling.py --vocabulary       the time of a draw alone, by the size of the vocabulary
    python benchmarks/sampling.py --smoke            seconds; the numbers mean nothing

A ratio is greedy decoding's time over the other call's, for the same prompt and as many tokens, and the median over
rounds is reported: 1 is greedy decoding's speed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
import torch
import transformers
from machine import describe

import minitron
from minitron.bench import measure
from minitron.engine.cpu.picking import pick
from minitron.engine.draws import Draws
from minitron.engine.mt19937 import seeded
from minitron.sampling_parameters import SamplingParameters

PROMPT = "Once upon a time there was a little"


class Neutral(transformers.LogitsProcessor):
    """A caller's processor that does the least."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 0] = -torch.inf
        return scores


class Never(transformers.StoppingCriteria):
    """A caller's criterion that stops nothing."""

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


GREEDY: dict[str, Any] = {"do_sample": False}
SAMPLED: dict[str, Any] = {"do_sample": True, "temperature": 0.8, "top_k": 0}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": GREEDY,
    "temperature 0.8": SAMPLED,
    "top-k 50": {**SAMPLED, "top_k": 50},
    "top-p 0.95": {**SAMPLED, "top_p": 0.95},
    "min-p 0.05": {**SAMPLED, "min_p": 0.05},
    "penalty 1.1": {**SAMPLED, "repetition_penalty": 1.1},
    "top-k 50, top-p 0.95, penalty 1.1": {**SAMPLED, "top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1},
    "greedy, penalty 1.1": {**GREEDY, "repetition_penalty": 1.1},
    "greedy, a processor": {**GREEDY, "logits_processor": transformers.LogitsProcessorList([Neutral()])},
    "sampled, a processor": {**SAMPLED, "logits_processor": transformers.LogitsProcessorList([Neutral()])},
    "greedy, a criterion": {**GREEDY, "stopping_criteria": transformers.StoppingCriteriaList([Never()])},
    "greedy, lookup": {**GREEDY, "draft": "lookup"},
    "greedy, int4 draft": {**GREEDY, "draft": "self"},
    "sampled, int4 draft": {**SAMPLED, "draft": "self"},
}


def whole_calls(new_tokens: int, rounds: int, widen: int, batch: int) -> list[dict]:
    """A row for each way: the speed of greedy decoding that it reaches."""
    model, tokenizer = minitron.load()
    if widen > 1:
        model = measure.widened(model, widen)
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]] * batch)

    def seconds(how: dict[str, Any]) -> float:
        torch.manual_seed(0)
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            eos_token_id=-1,
            pad_token_id=0,
            **how,
        )
        return time.perf_counter() - start

    works = {name: lambda how=how: seconds(how) for name, how in WAYS.items() if batch == 1 or "draft" not in how}
    for work in works.values():
        work()  # compiles
    found = measure.interleaved(works, rounds)
    rows = []
    for name, times in found.items():
        ratios = [greedy / other for greedy, other in zip(found["greedy"], times, strict=True)]
        rows.append(
            {
                "way": name,
                "batch": batch,
                "widened": widen,
                "new_tokens": new_tokens,
                "tokens_per_s": batch * new_tokens / statistics.median(times),
                "of_greedy": statistics.median(ratios),
                "range": [min(ratios), max(ratios)],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def draws(vocabularies: list[int], rounds: int) -> list[dict]:
    """Milliseconds of one draw in compiled code, without a model."""
    rows = []
    for V in vocabularies:
        logits = (3 * np.random.default_rng(0).standard_normal((1, V))).astype(np.float32)
        for name, how in WAYS.items():
            given = {key: value for key, value in how.items() if key in SamplingParameters.__dataclass_fields__}
            if not how["do_sample"] or len(given) + 1 < len(how):
                continue
            state = Draws(SamplingParameters(**given), V, [np.zeros(0, np.int64)], seeded(0))
            times = []
            for _ in range(rounds + 1):
                start = time.perf_counter()
                pick(state, logits)
                times.append(time.perf_counter() - start)
            rows.append({"vocabulary": V, "way": name, "ms": 1000 * statistics.median(times[1:])})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--widen", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--vocabulary", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", help="also write the rows to this JSON file")
    args = parser.parse_args()
    if args.smoke:
        args.tokens, args.rounds = 16, 1
    rows = (
        draws([4096, 32000, 256000][: 1 if args.smoke else 3], args.rounds)
        if args.vocabulary
        else whole_calls(args.tokens, args.rounds, args.widen, args.batch)
    )
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump({"machine": describe(smoke=args.smoke), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
