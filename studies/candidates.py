"""When does the order of candidates settle, and does a short ranking by one shared teacher find a good one?

Six shapes of equal size without embeddings, from two whole layers to four narrow ones, are pruned, compensated and
distilled, with held-out losses on the way (arXiv:2407.14679, Figure 9 and Tables 1 and 13: width against depth). Then
`compress.ranking.rank` chooses among them with a shorter schedule, dropping the worse half on its way, and what it
chose is compared with the best of the full runs.

    python studies/candidates.py TEXTS
    python studies/candidates.py TEXTS --cost        # how long the ranking takes, beside separate runs
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import arms
import figures
import numpy as np
from arms import Arm, Bench

from minitron.compress.ranking import Contender, Standing, rank
from minitron.compress.select import short_name
from minitron.distill.targets import OnlineTeacher
from minitron.prune.architecture import Architecture

NAME = "candidates"
SHAPES = [
    Architecture(*numbers)  # layers, hidden, heads, groups, MLP: 1.44 to 1.49 million parameters without embeddings
    for numbers in (
        (2, 256, 4, 2, 1024),
        (3, 192, 4, 2, 896),
        (3, 224, 4, 2, 704),
        (4, 192, 4, 2, 576),
        (4, 224, 2, 2, 576),
        (4, 256, 4, 2, 320),
    )
]
RATE = 2e-3
STEPS, EVALS = 24, 4
SHORT = 12
"""Steps of the ranking: half of the full runs."""
RUNGS = (0.5,)
COST_STEPS, COST_SHAPES = 24, 6


def full_runs(bench: Bench, seed: int) -> dict[str, list[dict[str, float]]]:
    """Curve of every candidate."""
    made = [Arm(arms.BEST, "kl", RATE, STEPS, seed, shape, EVALS) for shape in bench.few(SHAPES, 3)]
    return {short_name(arm.shape): bench.run(arm)["curve"] for arm in made}


def plain_starts(bench: Bench, seed: int) -> dict[str, float]:
    """Loss of every candidate right after the cut, without compensation."""
    made = [Arm("l2-mean", "kl", RATE, 0, seed, shape) for shape in bench.few(SHAPES, 3)]
    return {short_name(arm.shape): bench.measure(bench.start(arm)) for arm in made}


def contenders(bench: Bench, seed: int, shapes: Sequence[Architecture]) -> list[Contender]:
    """The candidates as a ranking takes them."""
    made = [Arm(arms.BEST, "kl", RATE, SHORT, seed, shape) for shape in shapes]
    return [Contender(short_name(arm.shape), lambda arm=arm: bench.start(arm).to(bench.device)) for arm in made]


def race(
    bench: Bench, seed: int, shapes: Sequence[Architecture], steps: int, rungs: tuple[float, ...], folder: Path
) -> Standing:
    """A ranking by the shared teacher."""
    config = bench.config(Arm(arms.BEST, "kl", RATE, steps, seed))
    return rank(
        contenders(bench, seed, shapes), lambda: OnlineTeacher(bench.teacher), bench.texts(seed).stream,
        {"text": bench.heldout}, config, rungs, folder, hidden_size=bench.teacher_config.hidden_size,
    )  # fmt: skip


def ranked(bench: Bench, seed: int) -> dict[str, Any]:
    """What the ranking found, or found before."""
    folder = bench.runs / f"ranking-{SHORT}-seed{seed}"
    done = folder / "result.json"
    if not done.is_file():
        standing = race(bench, seed, bench.few(SHAPES, 3), SHORT, RUNGS, folder)
        facts = {
            "order": standing.order, "losses": standing.losses, "teacher_blocks": standing.teacher_blocks,
            "student_blocks": standing.student_blocks,
        }  # fmt: skip
        done.write_text(json.dumps(facts), encoding="utf-8")
        print(f"ranking, seed {seed}: {', '.join(standing.order)}", file=sys.stderr, flush=True)
    return json.loads(done.read_text(encoding="utf-8"))


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def stability(curves: list[dict[str, list[dict[str, float]]]]) -> list[dict[str, Any]]:
    """At each place of the runs: how the order there agrees with that at the end, and what choosing there costs."""
    names = list(curves[0])
    rows = []
    for place in range(len(curves[0][names[0]])):
        here = [[curve[name][place]["loss"] for name in names] for curve in curves]
        end = [[curve[name][-1]["loss"] for name in names] for curve in curves]
        pairs = list(zip(here, end, strict=True))
        half = len(names) // 2
        rows.append({
            "tokens": curves[0][names[0]][place]["tokens"],
            "spearman": arms.mean_and_spread(rank_correlation(a, b) for a, b in pairs),
            "regret": arms.mean_and_spread(b[int(np.argmin(a))] - min(b) for a, b in pairs),
            "best_in_better_half": sum(int(np.argmin(b)) in np.argsort(a)[:half] for a, b in pairs) / len(pairs),
        })  # fmt: skip
    return rows


def chosen(curves: list[dict[str, list[dict[str, float]]]], rankings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each seed: what the ranking chose, and how far its full run ends above the best one."""
    rows = []
    for curve, found in zip(curves, rankings, strict=True):
        ends = {name: points[-1]["loss"] for name, points in curve.items()}
        name = found["order"][0]
        best = min(ends, key=ends.__getitem__)
        rows.append({"chosen": name, "best": best, "regret": ends[name] - ends[best]})
    return rows


def cost(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a ranking of some candidates, and of as many separate distillations of the same length.

    Seconds of processor time, which another load on the machine hardly changes. Held-out losses are measured on little
    text, since in a ranking of useful length they take no share of the time that counts.
    """
    shapes, steps = SHAPES[:COST_SHAPES], 2 if options.quick else COST_STEPS
    bench.heldout = bench.some_heldout(500)
    for contender in contenders(bench, 0, shapes):  # cut and compensated before the clock starts
        contender.load()
    folders = [bench.runs / name for name in ("cost-shared", "cost-separate")]
    seconds = []
    for shared, folder in zip((True, False), folders, strict=True):
        shutil.rmtree(folder, ignore_errors=True)
        began = time.process_time()
        if shared:
            race(bench, 0, shapes, steps, RUNGS, folder)
        else:  # a ranking of one, whose teacher nobody shares, is a distillation with a loss at its end
            for number, shape in enumerate(shapes):
                race(bench, 0, [shape], steps, (), folder / str(number))
        seconds.append(time.process_time() - began)
        shutil.rmtree(folder)
    return {"candidates": len(shapes), "steps": steps, "rungs": RUNGS, "machine": arms.machine_facts(),
            "shared_seconds": seconds[0], "separate_seconds": seconds[1], "ratio": seconds[0] / seconds[1]}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = arms.parser(__doc__)
    parser.add_argument("--cost", action="store_true", help="measure the time of a ranking instead")
    options = parser.parse_args(argv)
    bench = Bench(options)
    if options.cost:
        found = cost(bench, options)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "ranking_cost.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{found['shared_seconds']:.1f} s, separate {found['separate_seconds']:.1f} s: {found['ratio']:.2f}")
        return
    seeds = range(options.seeds)
    curves = [full_runs(bench, seed) for seed in seeds]
    rankings = [ranked(bench, seed) for seed in seeds]
    plain = [plain_starts(bench, seed) for seed in seeds]
    lines = {
        name: [
            {"tokens": point["tokens"], **arms.mean_and_spread(curve[name][i]["loss"] for curve in curves)}
            for i, point in enumerate(curves[0][name])
        ]
        for name in curves[0]
    }
    facts = {
        "learning_rate": RATE, "shapes": {short_name(shape): shape.as_dict() for shape in SHAPES}, "curves": lines,
        "plain_starts": {name: arms.mean_and_spread(p[name] for p in plain) for name in plain[0]},
        "stability": stability(curves), "chosen": chosen(curves, rankings),
        "ranking": {"steps": SHORT, "rungs": RUNGS, "found": rankings},
    }  # fmt: skip
    arms.write_result(options, bench, NAME, facts)
    figures.draw(options.plots / f"{NAME}.png", lines, {"tokens": "tokens"})
    print(figures.table({name: {f"{p['tokens'] // 1000}k": p for p in points} for name, points in lines.items()}))
    for row in facts["stability"]:
        print(f"{row['tokens']:>8}: Spearman {row['spearman']['mean']:.2f}, regret {row['regret']['mean']:.4f}, "
              f"best in better half {row['best_in_better_half']:.2f}")  # fmt: skip
    print(facts["chosen"])


if __name__ == "__main__":
    main()
