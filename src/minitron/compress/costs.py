"""What a compression costs, before it begins: tokens, FLOPs, memory, disk and hours of each stage.

FLOPs count multiply-adds twice, LM head included; training is three forward passes (arXiv:2407.14679, footnote 5 counts
likewise). Hours divide them by the speed of matrix products measured here, times `EFFICIENCY`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..config import ModelConfig
from ..shapes import describe, training_flops_per_token
from .recipe import Recipe

EFFICIENCY = 0.3
"""Share of the speed of large matrix products that a training step reaches; small models reach less."""
BYTES_TRAINED = 16
"""fp32 weight, gradient and AdamW's two averages of one parameter."""


@dataclass(frozen=True)
class StageCost:
    """An estimate of one stage."""

    name: str
    tokens: float
    flops: float
    memory_bytes: float
    """Weights and optimizer; activations come on top."""
    disk_bytes: float
    """What the stage leaves behind, or needs while it runs."""

    def as_dict(self, flops_per_second: float) -> dict[str, Any]:
        """For JSON, with hours."""
        return {**asdict(self), "hours": self.flops / flops_per_second / 3600}


def training_flops(student: ModelConfig, teacher: ModelConfig | None, tokens: float, sequence: int) -> float:
    """Of training on `tokens`: three passes of the student, one of the teacher."""
    return tokens * training_flops_per_token(student, sequence, teacher)


def compensation_flops(source: ModelConfig, student: ModelConfig, tokens: float, sequence: int) -> float:
    """Of `prune.compensation`: one pass of the source, and two of the student (to fit a layer, then to pass it)."""
    return tokens * (
        describe(source).flops_per_token(sequence // 2) + 2 * describe(student).flops_per_token(sequence // 2)
    )


def ranking_flops(shapes: Sequence[ModelConfig], teacher: ModelConfig, spans: Sequence[float], sequence: int) -> float:
    """Of retraining candidates: `spans[i]` tokens of candidate i, and the teacher once over the longest."""
    context = sequence // 2
    students = sum(3 * describe(c).flops_per_token(context) * n for c, n in zip(shapes, spans, strict=True))
    return students + describe(teacher).flops_per_token(context) * max(spans, default=0)


def alive_after(count: int, rungs: Sequence[float]) -> list[int]:
    """Candidates in each part of a ranking: all until the first rung, the better half until the next, and so on."""
    counts = [count]
    for _ in rungs:
        counts.append(max(1, -(-counts[-1] // 2)))
    return counts


def candidate_tokens(count: int, tokens: float, rungs: Sequence[float]) -> float:
    """Tokens that all candidates of a ranking together are trained on."""
    bounds = [0.0, *rungs, 1.0]
    parts = [(b - a) * tokens for a, b in itertools.pairwise(bounds)]
    return sum(n * part for n, part in zip(alive_after(count, rungs), parts, strict=True))


def plan_costs(
    recipe: Recipe,
    teacher: ModelConfig,
    shapes: Mapping[str, Sequence[ModelConfig]],
    heldout_tokens: int,
    distill_tokens: float,
) -> list[StageCost]:
    """Costs of all stages.

    Args:
        recipe: what will be done.
        teacher: its configuration.
        shapes: for each target the shapes that would be scored, the likeliest first.
        heldout_tokens: tokens that each candidate is scored on.
        distill_tokens: length of each target's distillation.
    """
    sequence = recipe.train.sequence
    weights = 4.0 * describe(teacher).num_parameters()
    costs: list[StageCost] = []
    if recipe.correction.kind != "none":
        n = recipe.correction.tokens
        memory = BYTES_TRAINED / 4 * weights
        costs.append(StageCost("correct", n, training_flops(teacher, None, n, sequence), memory, memory))
    source = teacher
    for index, found in enumerate(shapes.values()):
        name = recipe.target_name(index)
        calibrated = recipe.calibration.blocks * sequence
        flops = calibrated * describe(source).flops_per_token(sequence // 2)
        one_layer = 4.0 * describe(source).num_non_embedding_parameters() / source.num_hidden_layers
        residuals = 4.0 * calibrated * source.hidden_size
        costs.append(StageCost(f"{name}/importance", calibrated, flops, one_layer, residuals))
        student = found[0]
        if len(found) > 1:
            scored = heldout_tokens * len(found)
            flops = scored * describe(student).flops_per_token(sequence // 2)
            sizes = 2.0 * sum(describe(c).num_parameters() for c in found)
            costs.append(StageCost(f"{name}/score", scored, flops, 4.0 * describe(student).num_parameters(), sizes))
            tried = min(recipe.ranking.most, len(found))
            if tried > 1:
                costs.append(_ranking(recipe, name, list(found[:tried]), teacher))
        if recipe.calibration.compensation:
            flops = compensation_flops(source, student, calibrated, sequence)
            # In float64: Gram matrices of fitted and held-out blocks, the system and its factor.
            memory = one_layer + 4 * 8.0 * student.intermediate_size**2
            costs.append(
                StageCost(f"{name}/prune", calibrated, flops, memory, 2.0 * describe(student).num_parameters())
            )
        memory = BYTES_TRAINED * describe(student).num_parameters() + weights
        flops = training_flops(student, teacher, distill_tokens, sequence)
        disk = BYTES_TRAINED * describe(student).num_parameters() * recipe.train.keep
        costs.append(StageCost(f"{name}/distill", distill_tokens, flops, memory, disk))
        source = student
    return costs


def _ranking(recipe: Recipe, name: str, tried: list[ModelConfig], teacher: ModelConfig) -> StageCost:
    rungs, tokens = recipe.ranking.rungs, recipe.ranking.tokens
    together = candidate_tokens(len(tried), tokens, rungs)
    # Which of them are dropped is not known: each is assumed to see its share.
    flops = ranking_flops(tried, teacher, [together / len(tried)] * len(tried), recipe.train.sequence)
    flops += describe(teacher).flops_per_token(recipe.train.sequence // 2) * (tokens - together / len(tried))
    most = max(describe(c).num_parameters() for c in tried)
    disk = BYTES_TRAINED * sum(describe(c).num_parameters() for c in tried) + 2.0 * teacher.hidden_size * tokens / 2
    return StageCost(
        f"{name}/rank", together, flops, BYTES_TRAINED * most + 4.0 * describe(teacher).num_parameters(), disk
    )
