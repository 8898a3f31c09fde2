"""A shape cut out of a checkpoint, with what stays refitted to it where the recipe says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.hf import read_config
from ..prune.architecture import Architecture
from ..prune.compensation import compensate
from ..prune.plan import PrunePlan
from ..prune.surgery import prune_checkpoint
from .costs import refit_flops

if TYPE_CHECKING:
    from .run import Context


def refit_costs(context: Context, source: Path, shape: Architecture) -> dict[str, Any]:
    """Tokens and FLOPs of the refit."""
    if not context.recipe.calibration.refit:
        return {}
    tokens, config = context.recipe.calibration.blocks * context.recipe.train.sequence, read_config(source)
    return {"tokens": tokens, "flops": refit_flops(config, shape.config(config), tokens, context.recipe.train.sequence)}


def cut_out(context: Context, source: Path, plan: PrunePlan, out: Path) -> None:
    """Write `out`, what a plan leaves of a checkpoint; replaced if it is there."""
    if not context.recipe.calibration.refit:
        prune_checkpoint(source, out, plan, overwrite=True, check_source=False)
        return
    draft = out.with_name(f"{out.name}-as-cut")
    prune_checkpoint(source, draft, plan, overwrite=True, check_source=False)
    compensate(source, draft, plan, context.calibration(), out, device=context.device, overwrite=True)
    shutil.rmtree(draft)
