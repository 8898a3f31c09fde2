"""How many tokens does a model of half the size need: pruned and distilled, or trained from nothing?

Arms, all of the shape that `recipes/bundled.yaml` finds: random weights with cross-entropy (the usual way) or with
distillation, the teacher pruned at random with distillation, pruned by importance and compensated with cross-entropy,
and the same with distillation (the package's way; the paper's, without compensation, stands beside it). The learning
rate of each is the best at the first seed among powers of two, found by going downhill at a short length. Each length
is a run of its own with its own cosine.

    python studies/token_efficiency.py TEXTS
"""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import arms
import figures
from arms import Arm, Bench

from minitron.compress.costs import training_flops

NAME = "token_efficiency"
SCRATCH, OURS, PAPER = "random weights, CE", "pruned, compensated, KD", "pruned, KD"
WAYS = {
    SCRATCH: ("scratch", "ce"),
    "random weights, KD": ("scratch", "kl"),
    "pruned at random, KD": ("random", "kl"),
    "pruned, compensated, CE": (arms.BEST, "ce"),
    PAPER: ("l2-mean", "kl"),
    OURS: (arms.BEST, "kl"),
}
GRID_START, GRID_STEPS = 2e-3, 48
STEPS = {
    SCRATCH: (48, 240, 480, 960),
    "random weights, KD": (48,),
    "pruned at random, KD": (48,),
    "pruned, compensated, CE": (48,),
    PAPER: (24, 48),
    OURS: (12, 24, 48),
}
TEACHER_TOKENS = 27_200_000
"""What the bundled model was trained on, as its card says."""
LONG_GRID_STEPS = 240
"""Length at which the learning rate of the arm from random weights is looked at once more."""


def family(bench: Bench, tokens: int) -> dict[str, float]:
    """FLOPs of teacher and half, both trained from nothing on as many tokens as the teacher was, over those of the
    teacher and a half that is pruned and distilled on some tokens (the page's 1.8x is this ratio for three sizes)."""
    config = arms.SHAPE.config(bench.teacher_config)
    teacher, half = (training_flops(c, None, TEACHER_TOKENS, bench.sequence) for c in (bench.teacher_config, config))
    made = bench.flops(Arm(arms.BEST, "kl", GRID_START, 0, 0), tokens)
    return {"teacher": teacher, "half_from_nothing": half, "half_made": made,
            "ratio": (teacher + half) / (teacher + made)}  # fmt: skip


def tuned(
    bench: Bench, start: str, loss: str, steps: int, lr: float, factors: tuple[float, ...] = (2.0, 0.5)
) -> tuple[float, dict[str, float]]:
    """The best learning rate among `lr` times powers of the factors, and the losses that say so."""

    def at(rate: float) -> float:
        if f"{rate:g}" not in found:
            found[f"{rate:g}"] = arms.final(bench.run(Arm(start, loss, rate, steps, 0)))
        return found[f"{rate:g}"]

    found: dict[str, float] = {}
    for factor in factors:
        while not bench.quick and at(lr * factor) < at(lr):
            lr *= factor
    return lr, dict(sorted(found.items(), key=lambda pair: float(pair[0])))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    options = arms.parser(__doc__).parse_args(argv)
    bench = Bench(options)
    best, grids = {}, {}
    for way, (start, loss) in WAYS.items():
        best[way], grids[way] = tuned(bench, start, loss, GRID_STEPS, GRID_START)
    long_grid = tuned(bench, "scratch", "ce", LONG_GRID_STEPS, best[SCRATCH], (0.5,))  # longer runs want lower ones
    longer, grids[f"{SCRATCH}, long"] = long_grid
    losses: dict[str, dict[int, list[float]]] = {way: {} for way in WAYS}
    flops: dict[str, dict[int, float]] = {way: {} for way in WAYS}
    for way, (start, loss) in WAYS.items():
        for steps, seed in product(bench.few(STEPS[way]), range(options.seeds)):
            lr = longer if way == SCRATCH and steps >= LONG_GRID_STEPS else best[way]
            arm, tokens = Arm(start, loss, lr, steps, seed), steps * bench.tokens_per_step
            if not bench.is_wanted(arm):
                continue
            losses[way].setdefault(tokens, []).append(arms.final(bench.run(arm)))
            flops[way][tokens] = bench.flops(arm, tokens)
    curves = {
        way: [{"tokens": n, "flops": flops[way][n], **arms.mean_and_spread(v)} for n, v in sorted(found.items())]
        for way, found in losses.items()
    }
    facts = {
        "shape": arms.SHAPE.as_dict(), "learning_rates": best, "grid": grids, "long_learning_rate": longer,
        "curves": curves,
        "family": {tokens: family(bench, tokens) for tokens in losses[OURS]},
        "factors": {way: factors(losses, flops, way) for way in (PAPER, OURS)},
    }  # fmt: skip
    arms.write_result(options, bench, NAME, facts)
    figures.draw(
        options.plots / f"{NAME}.png", curves,
        {"tokens": "tokens", "flops": "FLOPs, calibration and teacher included"},
    )  # fmt: skip
    print(figures.table({way: {f"{p['tokens'] // 1000}k": p for p in points} for way, points in curves.items()}))


def factors(
    losses: dict[str, dict[int, list[float]]], flops: dict[str, dict[int, float]], fast: str
) -> list[dict[str, Any]]:
    """For each length of a way: tokens and FLOPs that training from nothing needs for the same loss, over its own.

    Lower bounds (`reached` is false) where the longest run from nothing does not get there.
    """
    found = []
    for tokens, values in sorted(losses[fast].items()):
        each = []
        for seed, loss in enumerate(values):
            curve = [(n, x[min(seed, len(x) - 1)]) for n, x in sorted(losses[SCRATCH].items())]
            each.append(tokens_to_reach(curve, loss))
        needed = [n or max(losses[SCRATCH]) for n in each]
        per_token = max(flops[SCRATCH].values()) / max(flops[SCRATCH])
        found.append({
            "tokens": tokens, "least": min(needed) / tokens, "most": max(needed) / tokens, "reached": None not in each,
            "flops_least": min(needed) * per_token / flops[fast][tokens],
            "flops_most": max(needed) * per_token / flops[fast][tokens],
        })  # fmt: skip
    return found


def tokens_to_reach(curve: list[tuple[int, float]], loss: float) -> float | None:
    """Where a falling curve of (tokens, loss) reaches `loss`, on straight lines in log tokens; None if it does not."""
    if curve[0][1] <= loss:
        return curve[0][0]
    for (t0, l0), (t1, l1) in pairwise(curve):
        if l0 >= loss >= l1 and l0 > l1:
            share = (l0 - loss) / (l0 - l1)
            return math.exp(math.log(t0) + share * (math.log(t1) - math.log(t0)))
    return None


if __name__ == "__main__":
    main()
