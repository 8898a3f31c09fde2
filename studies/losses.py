"""What to learn from: the next token, the teacher's logits, both, or hidden states too.

The bundled model cut by importance, compensated, and trained with each loss (arXiv:2407.14679, Tables 15 to 17). All
have the learning rate that is best for the forward KL of the logits.

    python studies/losses.py TEXTS
"""

from __future__ import annotations

import arms
import figures
from arms import Arm, Bench

NAME = "losses"
RATE, STEPS = 2e-3, 24
LOSSES = ("kl", "kl + cosine", "kl + mse", "kl + ce", "ce", "reverse kl")


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    options = arms.parser(__doc__).parse_args(argv)
    bench = Bench(options)
    found = {
        loss: [arms.final(bench.run(Arm(arms.BEST, loss, RATE, STEPS, seed))) for seed in range(options.seeds)]
        for loss in bench.few(LOSSES, 2)
    }
    rows = {
        loss: {"held-out loss": arms.mean_and_spread(values), "less the KL's": arms.paired(values, found["kl"])}
        for loss, values in found.items()
    }
    tokens = STEPS * bench.tokens_per_step
    facts = {"shape": arms.SHAPE.as_dict(), "learning_rate": RATE, "tokens": tokens, "losses": rows}
    arms.write_result(options, bench, NAME, facts)
    figures.draw_bars(
        options.plots / f"{NAME}.png", {k: {"held-out loss": v["held-out loss"]} for k, v in rows.items()}
    )
    print(figures.table(rows))


if __name__ == "__main__":
    main()
