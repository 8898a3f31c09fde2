"""How many tokens does a model of half the size need: pruned and distilled, or trained from nothing?

Arms, all of one shape (the bundled model with its MLP cut from 1024 to 320 neurons, half of its parameters without
embeddings): random weights with cross-entropy (the usual way) or with distillation, the teacher pruned at random with
distillation, pruned by importance with cross-entropy, and pruned by importance with distillation (the paper's way).
The learning rate of each is the best of a small grid at the first seed. Each length is a run of its own with its own
decay, so that points of a curve can be compared.

    python studies/token_efficiency.py TEXTS
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import arms
import torch
from arms import Arm, Bench
from torch import nn

from minitron.checkpoint.fingerprint import fingerprint
from minitron.distill.inputs import saved_model
from minitron.distill.losses import DistillLoss, DistillOptions
from minitron.distill.targets import OnlineTeacher
from minitron.prune.architecture import Architecture
from minitron.prune.choose import make_plan
from minitron.prune.importance import compute_importance
from minitron.prune.scores import Scores
from minitron.prune.surgery import prune_checkpoint

NAME = "token_efficiency"
KEEP = "ffn=320"
GRID = {"scratch": (2e-3, 4e-3), "pruned": (1e-3, 2e-3)}
GRID_TOKENS = 250_000
SHORT = (60_000, 125_000, 250_000, 500_000)
LONG = (500_000, 1_000_000, 2_000_000)
"""Lengths of the arm from random weights with cross-entropy, to find where it reaches the others."""
WAYS = {
    "random weights, CE": ("scratch", "ce"),
    "random weights, KD": ("scratch", "kd"),
    "pruned at random, KD": ("random", "kd"),
    "pruned by importance, CE": ("importance", "ce"),
    "pruned by importance, KD": ("importance", "kd"),
}
CALIBRATION_BLOCKS = 256


class Study(Bench):
    """The arms of this study."""

    def start(self, kind: str, seed: int) -> nn.Module:
        """The initial model of an arm."""
        shape = Architecture.parse(KEEP, self.teacher_config)
        if kind == "scratch":
            return arms.random_start(shape.config(self.teacher_config))(seed)
        out = self.runs / f"start-{kind}-{seed}"
        if not out.is_dir():
            scores = self.scores(seed)
            if kind == "random":
                random = torch.Generator().manual_seed(seed)
                neurons = [torch.rand(len(x), generator=random, dtype=torch.float64) for x in scores.neurons]
                scores = Scores(scores.heads, scores.groups, neurons, scores.channels, scores.layers)
            mark = fingerprint(self.teacher_folder)
            prune_checkpoint(self.teacher_folder, out, make_plan(self.teacher_config, scores, shape, source=mark))
        return saved_model(out)

    def scores(self, seed: int) -> Scores:
        """Importance measured on the first blocks of the training text in the order of a seed."""
        path = self.runs / f"importance-{seed}.safetensors"
        if not path.is_file():
            config = self.config(Arm("calibration", "", "", 1e-3, SHORT[0], seed))
            blocks = 4 if self.quick else CALIBRATION_BLOCKS
            batch = self.open(config).stream.batches(0, blocks, blocks)[0]
            compute_importance(self.teacher_folder, batch).save(path)
        return Scores.load(path)

    def arm(self, way: str, lr: float, tokens: int, seed: int) -> dict[str, Any]:
        """One run, or what it gave before."""
        kind, loss = WAYS[way]
        config = Architecture.parse(KEEP, self.teacher_config).config(self.teacher_config)
        context = self.sequence // 2
        flops = 3 * config.flops_per_token(context)
        made: Callable[..., Any] | None = None
        if loss == "kd":
            flops += self.teacher_config.flops_per_token(context)
            made = DistillLoss(OnlineTeacher(self.teacher), DistillOptions(), config)
        arm = Arm(f"{kind}-{loss}", kind, loss, lr, tokens, seed)
        return self.run(arm, lambda seed: self.start(kind, seed), made, float(flops))

    def rates(self) -> dict[str, float]:
        """The best learning rate of each way."""
        best = {}
        for way, (kind, _) in WAYS.items():
            grid = GRID["scratch" if kind == "scratch" else "pruned"][: 1 if self.quick else None]
            losses = {lr: final(self.arm(way, lr, GRID_TOKENS, 0)) for lr in grid}
            best[way] = min(losses, key=losses.__getitem__)
        return best


def final(result: dict[str, Any]) -> float:
    """Held-out loss at the end of a run."""
    return result["curve"][-1][arms.HELDOUT[0].removesuffix(".jsonl")]


def main() -> None:
    """Command line."""
    options = arms.arguments(__doc__)
    study = Study(options.texts, options.runs / NAME, options.quick)
    short, long = (SHORT[:1], LONG[:1]) if options.quick else (SHORT, LONG)
    rates = study.rates()
    rows: dict[str, dict[int, list[float]]] = {way: {} for way in WAYS}
    flops: dict[str, float] = {}
    for seed in range(options.seeds):
        for way in WAYS:
            lengths = sorted({*short, *long}) if way == "random weights, CE" else short
            for tokens in lengths:
                result = study.arm(way, rates[way], tokens, seed)
                rows[way].setdefault(tokens, []).append(final(result))
                flops[way] = result["curve"][-1]["flops"] / result["curve"][-1]["tokens"]
    table = {
        way: [{"tokens": n, "flops": n * flops[way], "mean": m, "spread": s, "seeds": len(v)}
              for n, v in sorted(found.items()) for m, s in [arms.mean_and_error(v)]]
        for way, found in rows.items()
    }  # fmt: skip
    facts = {"quick": options.quick, "keep": KEEP, "rates": rates, "curves": table, "factors": factors(rows, flops)}
    arms.write_result(options.out, NAME, facts)
    draw(table, options.plots)


def factors(rows: dict[str, dict[int, list[float]]], flops: dict[str, float]) -> list[dict[str, Any]]:
    """For each length of the paper's way: tokens and FLOPs that training from nothing needs for the same loss.

    Lower bounds where the longest run from nothing does not get there.
    """
    slow, fast = "random weights, CE", "pruned by importance, KD"
    found = []
    for tokens, losses in sorted(rows[fast].items()):
        each = []
        for seed, loss in enumerate(losses):
            curve = [(n, values[seed]) for n, values in sorted(rows[slow].items()) if seed < len(values)]
            needed = arms.tokens_to_reach(curve, loss)
            each.append({"tokens": needed or curve[-1][0], "reached": needed is not None})
        ratios = [row["tokens"] / tokens for row in each]
        found.append({
            "tokens": tokens, "ratio_least": min(ratios), "ratio_most": max(ratios),
            "flops_ratio_least": min(ratios) * flops[slow] / flops[fast],
            "reached": all(row["reached"] for row in each),
        })  # fmt: skip
    return found


def draw(table: dict[str, list[dict[str, Any]]], folder: Any) -> None:
    """Loss against tokens and against FLOPs, with the spread over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for way, points in table.items():
        for axis, key in zip(axes, ("tokens", "flops"), strict=True):
            x, y, e = ([p[k] for p in points] for k in (key, "mean", "spread"))
            axis.errorbar(x, y, yerr=e, marker="o", capsize=3, label=way)
            axis.set_xscale("log")
            axis.grid(alpha=0.3)
    axes[0].set(xlabel="tokens", ylabel="held-out loss, nats per token")
    axes[1].set(xlabel="FLOPs, the teacher's forward passes included")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{NAME}.png", dpi=110)


if __name__ == "__main__":
    main()
