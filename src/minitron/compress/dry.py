"""What a recipe would cost here, stage by stage, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.hf import read_config
from ..config import NemotronConfig
from ..data.token_cache import TokenFolder
from ..files import require_unlocked
from ..train.machine import measured_peak
from .costs import EFFICIENCY, plan_costs
from .recipe import Recipe
from .run import Context, open_context, token_folder
from .select import spread, within_budget


def estimate(
    recipe: Recipe,
    out: Path,
    *,
    cache: Path | TokenFolder | None = None,
    device: str = "auto",
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Rows of `costs.StageCost` with hours. Tokenizes the text, and checks all budgets.

    Nothing is written to `out`. The tokens stay in `cache` if it is given.

    A target's shape is not known before the search: the first of those that would be retrained stands for it, and the
    next target is cut from that.

    Raises:
        As `run.compress`.
    """
    require_unlocked(out)
    with token_folder(out, cache) as store:
        rows = _rows(open_context(recipe, out, store, device, True, say))
        if cache is None:
            store.discard()
    return rows


def _rows(context: Context) -> list[dict[str, Any]]:
    recipe = context.recipe
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
