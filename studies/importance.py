"""Which ranking of units to cut by, right after the cut and after a short retraining, and whether to cut in steps.

Rankings: the nine pairs of aggregations of the paper's Table 11 (arXiv:2407.14679), random and weight magnitude; those
named in `RETRAINED` are distilled for a while, with and without compensation. Then channels alone are cut in one, two
and four rounds with importance measured anew in each (Table 12).

    python studies/importance.py TEXTS
"""

from __future__ import annotations

import shutil
from itertools import product
from typing import Any

import arms
import figures
from arms import Arm, Bench
from torch import nn

from minitron.prune.architecture import Architecture
from minitron.prune.importance import collect_statistics
from minitron.prune.statistics import AGGREGATIONS
from minitron.train.inputs import saved_model

NAME = "importance"
RATE, STEPS = 2e-3, 24
RANKINGS = [*(f"{a}-{b}" for a, b in product(AGGREGATIONS, AGGREGATIONS)), "random", "magnitude"]
RETRAINED = ("l2-mean", "mean-mean", "mean-variance", "random", "magnitude")
COMPENSATED = ("l2-mean", "mean-variance", "random", "magnitude")
CHANNELS = {1: (160,), 2: (208, 160), 4: (232, 208, 184, 160)}
"""Rounds -> channels that stay after each."""


def in_rounds(bench: Bench, arm: Arm) -> nn.Module:
    """The bundled model with fewer channels, cut in as many rounds as the arm's start says."""
    rounds = CHANNELS[int(arm.start.removeprefix("rounds"))]
    source, blocks = bench.source, bench.calibration(arm.seed)
    places = []
    for number, width in enumerate(rounds):
        scores = collect_statistics(source, blocks).scores()
        shape = Architecture(**{**arm.shape.as_dict(), "hidden": width})
        places.append(bench.runs / "starts" / f"{arm.start}-{number}-seed{arm.seed}")
        source = bench.cut(source, scores, shape, places[-1], None)
    model = saved_model(source)
    for place in places:
        shutil.rmtree(place)
    return model


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    options = arms.parser(__doc__).parse_args(argv)
    bench = Bench(options)
    seeds = range(options.seeds)
    rankings = bench.few(RANKINGS)
    rows: dict[str, dict[str, Any]] = {}
    for ranking in rankings:
        starts = [bench.start(Arm(ranking, "kl", RATE, STEPS, seed)) for seed in seeds]
        rows[ranking] = {"right after the cut": arms.mean_and_spread(map(bench.measure, starts))}
    for ranking, compensation in bench.few([(r, "") for r in RETRAINED]) + bench.few(
        [(r, "+compensation") for r in COMPENSATED]
    ):
        made = [Arm(ranking + compensation, "kl", RATE, STEPS, seed) for seed in seeds]
        if not all(map(bench.is_wanted, made)):
            continue
        found = list(map(bench.run, made))
        with_compensation = ", compensated" if compensation else ""
        row = rows.setdefault(ranking, {})
        row[f"right after the cut{with_compensation}"] = arms.mean_and_spread(r["curve"][0]["loss"] for r in found)
        row[f"retrained{with_compensation}"] = arms.mean_and_spread(map(arms.final, found))
    shape = Architecture.of(bench.teacher_config)
    shape = Architecture(**{**shape.as_dict(), "hidden": CHANNELS[1][0]})
    rounds: dict[str, dict[str, Any]] = {}
    for count in bench.few(list(CHANNELS), 2):
        made_arms = [Arm(f"rounds{count}", "kl", RATE, STEPS, seed, shape) for seed in seeds]
        if not all(map(bench.is_wanted, made_arms)):
            continue
        found = [bench.run(arm, lambda arm: in_rounds(bench, arm)) for arm in made_arms]
        rounds[f"{count} rounds" if count > 1 else "1 round"] = {
            "right after the cut": arms.mean_and_spread(r["curve"][0]["loss"] for r in found),
            "retrained": arms.mean_and_spread(map(arms.final, found)),
        }
    tokens = STEPS * bench.tokens_per_step
    facts = {"shape": arms.SHAPE.as_dict(), "learning_rate": RATE, "tokens": tokens, "rankings": rows,
             "channels": shape.as_dict(), "rounds": rounds}  # fmt: skip
    arms.write_result(options, bench, NAME, facts)
    figures.draw_bars(options.plots / f"{NAME}.png", {**rows, **rounds})
    print(*map(figures.table, filter(None, (rows, rounds))), sep="\n\n")


if __name__ == "__main__":
    main()
