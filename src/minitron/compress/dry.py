"""What a recipe would cost here, stage by stage, before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.hf import read_config
from ..config import NemotronConfig
from ..distill.machine import measured_peak
from .costs import EFFICIENCY, plan_costs
from .recipe import Recipe
from .run import open_context
from .select import spread, within_budget


def estimate(recipe: Recipe, out: Path, *, cache: Path | None = None, device: str = "auto") -> list[dict[str, Any]]:
    """Rows of `costs.StageCost` with hours. Tokenizes the text, which the run needs anyway, and checks all budgets.

    A target's shape is not known before the search: the first of those that would be retrained stands for it, and the
    next target is cut from that.

    Raises:
        As `run.compress`.
    """
    context = open_context(recipe, out, cache or out / "token-cache", device, True, lambda _: None)
    teacher = read_config(context.teacher)
    speed = EFFICIENCY * measured_peak(context.device, recipe.train.dtype)
    source = teacher
    shapes: dict[str, list[NemotronConfig]] = {}
    for index in range(len(recipe.targets)):
        found, _ = within_budget(context, index, source)
        candidates = [candidate.architecture for candidate in found]
        first = spread(candidates, recipe.ranking.most)
        ordered = [*first, *(c for c in candidates if c not in first)]
        shapes[recipe.target_name(index)] = [shape.config(source) for shape in ordered]
        source = shapes[recipe.target_name(index)][0]
    steps = recipe.train.total_steps
    tokens = (
        steps * recipe.train.tokens_per_step
        if steps is not None
        else (recipe.train.hours or 0) * 3600 * speed / (teacher.flops_per_token() + 3 * source.flops_per_token())
    )
    rows = plan_costs(recipe, teacher, shapes, recipe.ranking.score_blocks * recipe.train.sequence, tokens)
    return [row.as_dict(speed) for row in rows]
