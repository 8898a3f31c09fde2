"""Greedy tokens of the engine against the reference in fp32 on the same weights, over pieces of real text.

    python benchmarks/greedy_equality.py --text ../shared/datasets/books/heldout.jsonl.xz
    python benchmarks/greedy_equality.py --text TEXTS.jsonl --prompts 2 --tokens 3    a smoke run

Prompts are pieces of 24 to 88 tokens from places spread evenly over the texts; the model is the bundled one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import minitron
from minitron.bench.fidelity import greedy_differences
from minitron.data.documents import read_documents


def main() -> None:
    """Print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=520)
    parser.add_argument("--tokens", type=int, default=24)
    arguments = parser.parse_args()
    model, tokenizer = minitron.load()
    ids: list[int] = []
    for text in read_documents(arguments.text):
        ids += tokenizer(text[:20_000])["input_ids"]
    step = (len(ids) - 100) // arguments.prompts
    prompts = [ids[n * step : n * step + 24 + n % 65] for n in range(arguments.prompts)]
    found = greedy_differences(model, prompts, arguments.tokens)
    facts = {
        "prompts": len(prompts),
        "tokens": len(prompts) * arguments.tokens,
        "differ": len(found),
        "largest_gap": max((one.gap for one in found), default=0.0),
        "gaps": sorted(round(one.gap, 6) for one in found),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
