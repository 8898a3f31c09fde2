"""How much of the gain of compensation is left after retraining?

The bundled model cut by importance, with and without the compensation of norms and output projections
(`prune.compensation`), distilled for longer and longer. Each length is a run of its own with its own cosine.

    python studies/compensation.py TEXTS
"""

from __future__ import annotations

from typing import Any

import arms
import figures
from arms import Arm, Bench

NAME = "compensation"
RATE = 2e-3
STEPS = {"l2-mean": (24, 48)}


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    options = arms.parser(__doc__).parse_args(argv)
    bench = Bench(options)
    seeds = range(options.seeds)
    curves: dict[str, list[dict[str, Any]]] = {}
    gains: dict[str, list[dict[str, Any]]] = {}
    for ranking, lengths in STEPS.items():
        for compensation in ("", "+compensation"):
            points = curves[ranking + compensation] = []
            for steps in bench.few(lengths):
                found = [bench.run(Arm(ranking + compensation, "kl", RATE, steps, seed)) for seed in seeds]
                if not points:
                    points.append({"tokens": 0, **arms.mean_and_spread(r["curve"][0]["loss"] for r in found)})
                tokens = steps * bench.tokens_per_step
                points.append({"tokens": tokens, **arms.mean_and_spread(map(arms.final, found))})
        both = zip(curves[ranking], curves[f"{ranking}+compensation"], strict=True)
        gains[ranking] = [{"tokens": a["tokens"], **arms.paired(a["values"], b["values"])} for a, b in both]
    facts = {"shape": arms.SHAPE.as_dict(), "learning_rate": RATE, "curves": curves, "gains": gains}
    arms.write_result(options, bench, NAME, facts)
    figures.draw(options.plots / f"{NAME}.png", curves, {"tokens": "tokens"})
    print(figures.table({f"gain, {name}": {f"{p['tokens'] // 1000}k": p for p in row} for name, row in gains.items()}))


if __name__ == "__main__":
    main()
