"""What it costs to find out whether a model was edited, beside a call of `generate`.

    python benchmarks/edits.py                 the bundled model
    python benchmarks/edits.py --widen 8       a larger one that computes the same

Prints JSON: milliseconds of reading the modules anew, of the checksums and of a call, medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import minitron
from minitron.bench.measure import widened
from minitron.engine.checksums import checksums
from minitron.engine.model_weights import weights_of
from minitron.engine.models import why_not_model
from minitron.engine.weights import copied, tensors_of
from minitron.families import family_of


def milliseconds(work: Callable[[], Any]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widen", type=int, default=1, help="a power of two")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    model, tokenizer = minitron.load(device="cpu")
    if options.widen > 1:
        model = widened(model, options.widen)
    ids = torch.tensor([tokenizer("Once upon a time there was a little")["input_ids"]])
    summed = copied(tensors_of(model), "bf16", family_of(model.config))
    works: dict[str, Callable[[], Any]] = {
        "is it served": lambda: why_not_model(model),
        "weights as they are": lambda: weights_of(model),
        "of that checksums": lambda: checksums(summed),
        "call": lambda: model.generate(ids, max_new_tokens=options.tokens, do_sample=False, eos_token_id=None),
    }
    for work in works.values():
        work()
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.rounds):
        for name, work in works.items():
            found[name].append(milliseconds(work))
    medians = {name: round(statistics.median(times), 3) for name, times in found.items()}
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in summed.values())
    share = medians["of that checksums"] / medians["call"]
    print(
        json.dumps(
            {
                "processor": platform.machine(),
                "threads": torch.get_num_threads(),
                "tokens": options.tokens,
                "summed bytes": nbytes,
                **medians,
                "share": share,
            }
        )
    )


if __name__ == "__main__":
    main()
