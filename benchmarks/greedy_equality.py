"""Greedy tokens of the engine over pieces of real text, against the reference or against transformers' own loop.

    python benchmarks/greedy_equality.py --text ../shared/datasets/books/heldout.jsonl.xz
    python benchmarks/greedy_equality.py --model smollm2 --against transformers --dtype fp32 --prompts 200 --text FILE
    python benchmarks/greedy_equality.py --text TEXTS.jsonl --prompts 2 --tokens 3    a smoke run

Prompts are pieces of 24 to 88 tokens (--shortest, --longest) from positions spread evenly over the texts; the model is
the bundled one if none is given. "reference" is the plain torch engine in fp32 on the same weights. "transformers" is
its own loop on the same model in the same dtype, eight prompts in a batch; each first difference is judged by logits in
float64: it is a near tie if the two tokens are closer than four times the root mean square error of transformers'
logits.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import minitron
from minitron.bench.fidelity import greedy_differences, loop_differences
from minitron.data.documents import read_documents


def pieces(tokenizer: Any, path: Path, count: int, shortest: int, longest: int) -> list[list[int]]:
    """So many prompts of these lengths from a file of texts."""
    ids: list[int] = []
    for text in read_documents(path):
        ids += tokenizer(text[:20_000])["input_ids"]
    step = (len(ids) - longest - 12) // count
    return [ids[n * step : n * step + shortest + n % (longest - shortest + 1)] for n in range(count)]


def against_reference(model: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Figures of `greedy_differences`."""
    found = greedy_differences(model, prompts, tokens)
    return {
        "differ": len(found),
        "largest_gap": max((one.gap for one in found), default=0.0),
        "gaps": sorted(round(one.gap, 6) for one in found),
    }


def against_transformers(model: Any, prompts: list[list[int]], tokens: int) -> dict[str, Any]:
    """Figures of `loop_differences`."""
    found = loop_differences(model, prompts, tokens)
    return {
        "differ": len(found),
        "near_ties": sum(one.near_tie for one in found),
        "engine_right": sum(one.gap > 0 for one in found),
        "gaps_over_noise": sorted(round(one.gap / max(one.noise, 1e-30), 3) for one in found),
    }


def main() -> None:
    """Print a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or name; the bundled model by default")
    parser.add_argument("--against", choices=("reference", "transformers"), default="reference")
    parser.add_argument("--dtype", default="auto", help="auto, bf16 or fp32")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=520)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--shortest", type=int, default=24, help="tokens of a prompt")
    parser.add_argument("--longest", type=int, default=88)
    parser.add_argument("--out", type=Path, help="write the JSON object here too")
    arguments = parser.parse_args()
    model, tokenizer = minitron.load(arguments.model, dtype=arguments.dtype, device="cpu")
    prompts = pieces(tokenizer, arguments.text, arguments.prompts, arguments.shortest, arguments.longest)
    compare = against_reference if arguments.against == "reference" else against_transformers
    facts = {
        "model": Path(arguments.model or "bundled").name,
        "against": arguments.against,
        "dtype": str(model.dtype).removeprefix("torch."),
        "prompts": len(prompts),
        "tokens": len(prompts) * arguments.tokens,
        **compare(model, prompts, arguments.tokens),
    }
    print(json.dumps(facts))
    if arguments.out:
        arguments.out.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
