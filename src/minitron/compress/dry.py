"""What a recipe costs here, stage by stage, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.hf import read_config
from ..config import ModelConfig
from ..data.token_cache import TokenFolder
from ..files import require_unlocked
from ..loading import pick_device
from ..shapes import describe
from ..train.machine import measured_peak
from ..train.parallel import make_world
from ..world import World
from .context import Context, open_context, token_folder
from .costs import EFFICIENCY, plan_costs
from .recipe import Recipe
from .select import spread, within_budget

DIVIDED = ("correct", "importance", "rank", "distill")
"""Stages that processes divide; the first process does the others."""


def estimate(
    recipe: Recipe,
    out: Path,
    *,
    cache: Path | TokenFolder | None = None,
    device: str = "auto",
    say: Callable[[str], None] = lambda _: None,
    world: World | None = None,
) -> list[dict[str, Any]]:
    """Rows of `costs.StageCost` with hours. Tokenizes the text, and checks all budgets.

    Nothing is written to `out`. The tokens stay in `cache` if it is given. In a world
    of many processes hours count what they divide among them; memory and disk are of all together.

    A target's shape is not known before the search: the first of the shapes that would be retrained stands in, and
    the next target is cut from that.

    Raises:
        As `run.compress`.
    """
    place = pick_device(device)
    world = world or make_world(device=place)
    world.first_does(lambda: require_unlocked(out))
    with token_folder(out, cache) as store:
        context = open_context(recipe, out, store, place, world, True, say)
        rows = world.first_does(lambda: _rows(context))
        if cache is None:
            store.discard()
    return rows


def _rows(context: Context) -> list[dict[str, Any]]:
    recipe = context.recipe
    teacher = read_config(context.checkpoint)
    speed = EFFICIENCY * measured_peak(context.device, recipe.train.dtype)
    source = teacher
    shapes: dict[str, list[ModelConfig]] = {}
    for index in range(len(recipe.targets)):
        found, _ = within_budget(context, index, source)
        candidates = [candidate.architecture for candidate in found]
        first = spread(candidates, recipe.ranking.most)
        ordered = [*first, *(c for c in candidates if c not in first)]
        shapes[recipe.target_name(index)] = [shape.config(source) for shape in ordered]
        source = shapes[recipe.target_name(index)][0]
    steps = recipe.train.total_steps
    if steps is not None:
        tokens = float(steps * recipe.train.tokens_per_step)
    else:
        per_token = describe(teacher).flops_per_token() + 3 * describe(source).flops_per_token()
        tokens = (recipe.train.hours or 0) * 3600 * speed / per_token
    rows = plan_costs(recipe, teacher, shapes, recipe.ranking.score_blocks * recipe.train.sequence, tokens)
    return [row.as_dict(speed * (context.world.size if row.name.endswith(DIVIDED) else 1)) for row in rows]
