"""The stages around the cut: importance of what a target is cut from, and the cut of the chosen shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.hf import read_config
from ..prune.architecture import Architecture
from ..prune.choose import make_plan
from ..prune.importance import check_language
from ..prune.plan import PrunePlan
from ..prune.scores import Scores
from ..prune.steps import cut, measure_importance
from ..shapes import describe
from .context import Context
from .costs import compensation_flops


def score_importance(context: Context, name: str, source: Path) -> Scores:
    """Scores of every unit of the checkpoint that a target is cut from."""
    path = context.folder / name / "importance" / "importance.safetensors"
    recipe, config = context.recipe, read_config(source)
    blocks, sequence = recipe.calibration.blocks, recipe.train.sequence
    inputs = {"source": context.fingerprint(source), "blocks": blocks, "data": context.data_key}

    def work(folder: Path) -> dict[str, Any]:
        batch = context.calibration()
        check_language(batch, context.tokenizer)
        measure_importance(source, batch, path, work=folder / "work", device=context.device, world=context.world)
        tokens = blocks * sequence
        return {"tokens": tokens, "flops": tokens * describe(config).flops_per_token(sequence // 2)}

    context.stages.run(f"{name}/importance", inputs, work)
    return Scores.load(path)


def cut_out(context: Context, source: Path, plan: PrunePlan, out: Path) -> None:
    """Write `out`: what a plan keeps of a checkpoint, compensated on the calibration text if the recipe wants that.

    `out` is replaced if it is there. The first process does it and the others wait.
    """
    compensated = context.recipe.calibration.compensation

    def once() -> None:
        cut(source, plan, out, calibration=context.calibration() if compensated else None, device=context.device)

    context.world.first_does(once)


def compensation_costs(context: Context, source: Path, shape: Architecture) -> dict[str, Any]:
    """Tokens and FLOPs of the compensation of one shape; empty without it."""
    if not context.recipe.calibration.compensation:
        return {}
    sequence, config = context.recipe.train.sequence, read_config(source)
    tokens = context.recipe.calibration.blocks * sequence
    return {"tokens": tokens, "flops": compensation_flops(config, shape.config(config), tokens, sequence)}


def prune_target(
    context: Context, name: str, source: Path, scores: Scores, shape: Architecture, inputs: dict[str, Any]
) -> Path:
    """Cut the chosen shape out of a checkpoint.

    Args:
        inputs: what the choice of the shape depended on; see `select.selection_inputs`.

    Returns:
        The folder of the pruned checkpoint.
    """
    out = context.folder / name / "prune" / "model"
    mark = context.fingerprint(source)

    def work(folder: Path) -> dict[str, Any]:
        plan = make_plan(read_config(source), scores, shape, source=mark)
        context.world.first_does(lambda: plan.save(folder / "plan.json"))
        cut_out(context, source, plan, out)
        facts = {"plan": plan.hash, "shape": shape.as_dict(), "model": context.fingerprint(out)}
        return {**facts, **compensation_costs(context, source, shape)}

    context.stages.run(f"{name}/prune", {"source": mark, "shape": shape.as_dict(), **inputs}, work)
    return out
