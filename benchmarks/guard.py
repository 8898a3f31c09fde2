"""What a guard in the forward pass costs: the same requests with and without one, in turn, in one process.

    python benchmarks/guard.py [--model bundled] [--smoke]

Prints the median of the ratios of the times of pairs, for one request and for eight, greedy and sampled. The head has
random weights: what it says costs nothing, and it refuses nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from minitron.engine.engines import open_engine
from minitron.engine.model_weights import weights_of
from minitron.loading import load
from minitron.sampling_parameters import SamplingParameters
from minitron.serve.guard import SharedGuard, Verdicts
from minitron.serve.scheduler import Scheduler, TextSequence
from minitron.serve.text_output import TextOutput
from minitron.serve.token_choice import TokenChooser, TokenRules


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--smoke", action="store_true", help="one pair of short answers")
    given = parser.parse_args()
    pairs, tokens = (1, 4) if given.smoke else (given.pairs, given.tokens)
    loaded = load(given.model)
    weights = weights_of(loaded.model)
    head = np.random.default_rng(0).normal(size=(2, weights.hidden_size)).astype(np.float32) * 0.01
    guard = SharedGuard("random", "flag", head, Verdicts(("fine", "bad"), (1,), several=False, threshold=1.0))
    prompt = np.random.default_rng(1).integers(10, weights.vocab_size, 64).tolist()
    with open_engine(weights, 256, 8) as engine:
        engine.prepare()
        for count in (1, 8):
            for temperature in (0.0, 1.0):
                times = {True: [], False: []}
                for number in range(pairs + 1):
                    for guarded in (True, False) if number % 2 else (False, True):
                        scheduler = Scheduler(engine, guard=guard if guarded else None)
                        sequences = [_sequence(loaded, prompt, tokens, temperature) for _ in range(count)]
                        times[guarded].append(_seconds(scheduler, sequences))
                ratios = [a / b for a, b in zip(times[True][1:], times[False][1:], strict=True)]
                kind = "sampled" if temperature else "greedy"
                print(
                    f"{count} x {tokens} tokens, {kind}: {1000 * statistics.median(times[False][1:]):.1f} ms without, "
                    f"ratio with a guard {statistics.median(ratios):.3f} (medians of {pairs} pairs)"
                )


def _sequence(loaded: object, prompt: list[int], tokens: int, temperature: float) -> TextSequence:
    rules = TokenRules(SamplingParameters(temperature=temperature, seed=0))
    size = loaded.model.config.vocab_size  # type: ignore[attr-defined]
    output = TextOutput(lambda ids: "x" * len(ids), prompt)
    return TextSequence(list(prompt), TokenChooser(rules, prompt, size), output, tokens)


def _seconds(scheduler: Scheduler, sequences: list[TextSequence]) -> float:
    start = time.perf_counter()
    scheduler.submit(*sequences)
    while not all(sequence.ended for sequence in sequences):
        scheduler.step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
