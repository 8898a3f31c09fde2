"""One step to half of the size, or two, at equal tokens (arXiv:2407.14679, Table 14)?

One step: cut the bundled model to half, distill. Two steps: cut it to three quarters, distill, measure importance in
the result, cut that to half, distill; the teacher of both distillations is the bundled model.

    python studies/steps.py TEXTS
"""

from __future__ import annotations

import arms
import figures
from arms import Arm, Bench
from torch import nn

from minitron.prune.architecture import Architecture
from minitron.prune.importance import collect_statistics
from minitron.train.inputs import saved_model

NAME = "steps"
RATE = 2e-3
BETWEEN = Architecture(layers=4, hidden=240, heads=4, groups=2, ffn=768)
"""77% of the bundled model's parameters without embeddings."""
STEPS = {"two steps": (24, 24)}
ONE = 48


def first_half(arm: Arm, steps: int) -> Arm:
    """The run of the size between."""
    return Arm(arms.BEST, "kl", RATE, steps, arm.seed, BETWEEN)


def second_start(bench: Bench, arm: Arm, steps: int) -> nn.Module:
    """What is cut out of the trained model of the size between."""
    before = first_half(arm, steps)
    bench.run(before, keep=True)
    source, blocks = bench.runs / before.folder / "model", bench.calibration(arm.seed)
    scores = collect_statistics(source, blocks).scores()
    out = bench.runs / "starts" / f"{arm.start}-seed{arm.seed}"
    return saved_model(bench.cut(source, scores, arm.shape, out, blocks))


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    options = arms.parser(__doc__).parse_args(argv)
    bench = Bench(options)
    seeds = range(options.seeds)
    one = [arms.final(bench.run(Arm(arms.BEST, "kl", RATE, ONE, seed))) for seed in seeds]
    rows = {"one step": {"held-out loss": arms.mean_and_spread(one)}}
    for name, (first, second) in bench.few(list(STEPS.items())):
        made = [Arm(f"after{first}+compensation", "kl", RATE, second, seed) for seed in seeds]
        found = [bench.run(arm, lambda arm, first=first: second_start(bench, arm, first)) for arm in made]
        values = list(map(arms.final, found))
        rows[name] = {
            "right after the second cut": arms.mean_and_spread(r["curve"][0]["loss"] for r in found),
            "held-out loss": arms.mean_and_spread(values),
            "less that of one step": arms.paired(values, one),
        }
    tokens = ONE * bench.tokens_per_step
    facts = {"shape": arms.SHAPE.as_dict(), "between": BETWEEN.as_dict(), "learning_rate": RATE, "tokens": tokens,
             "rows": rows}  # fmt: skip
    arms.write_result(options, bench, NAME, facts)
    figures.draw_bars(
        options.plots / f"{NAME}.png", {k: {"held-out loss": v["held-out loss"]} for k, v in rows.items()}
    )
    print(figures.table(rows))


if __name__ == "__main__":
    main()
