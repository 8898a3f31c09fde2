"""`compress`: all stages in their order, from a teacher and a budget to a smaller model with its report.

teacher (correction) -> for each target: importance -> candidates -> ranking -> pruning -> distillation by the
*original* teacher -> evaluation -> report. Each stage is a folder of the run (see `stages`), in the formats that the
single commands read and write. Under torchrun every process calls `compress`: what trains is sharded, calibration is
divided, and the first process does the rest while the others wait.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.hf import read_config
from ..data.token_cache import TokenFolder
from ..files import locked, write_text
from ..loading import pick_device
from ..train.parallel import make_world
from ..world import World
from .context import RECIPE_FILE, Context, open_context, token_folder
from .cutting import prune_target, score_importance
from .recipe import Recipe, with_absolute_paths
from .retraining import correct, distill_target
from .select import choose, require_memory_for, selection_inputs, within_budget


@dataclass(frozen=True)
class Compressed:
    """What a compression made."""

    models: dict[str, Path]
    """Name of each target to its checkpoint."""
    report: Path
    """The page; `report.json` is in the same folder."""


def compress(
    recipe: Recipe,
    out: Path,
    *,
    cache: Path | TokenFolder | None = None,
    device: str = "auto",
    quiet: bool = False,
    say: Callable[[str], None] | None = None,
    world: World | None = None,
) -> Compressed:
    """Make the models of a recipe, or continue where an earlier call was interrupted.

    Args:
        recipe: what to do.
        out: run folder; made if it is not there. It may be copied to another machine and continued there.
        cache: folder for tokenized text; `token-cache` in the run folder if None.
        device: where models run.
        quiet: no progress bars.
        say: called with messages, in the first process; stderr if None.
        world: the processes, from `train.parallel.make_world`; those of torch.distributed if None. All call this.

    Raises:
        RecipeError, RunError, ValueError: what is wrong with the recipe, the run folder, the checkpoint or the text.
        LockedError: another run uses the run folder.
        TargetError: the run folder overlaps with the checkpoint or the text.
        WriteError: the disk is full or refuses.
        StoppedError: SIGTERM or Ctrl-C, with everything saved.
    """
    place = pick_device(device)
    world = world or make_world(device=place)
    with _locked(out, world), token_folder(out, cache) as store:
        context = open_context(recipe, out, store, place, world, quiet, say or _to_stderr)
        world.first_does(lambda: _accept(context))
        store.keep()
        return _all_stages(context)


@contextmanager
def _locked(out: Path, world: World) -> Iterator[None]:
    """The run folder, locked by the first process for all."""
    lock = locked(out)
    world.first_does(lock.__enter__)
    try:
        yield
    finally:
        if world.first:
            lock.__exit__(None, None, None)


def _accept(context: Context) -> None:
    """Refuse what can be seen to fail, then write the recipe into the run folder.

    Raises:
        SearchError, RecipeError: no shape meets the first budget, or the memory does not suffice to train one.
    """
    recipe, source = context.recipe, read_config(context.checkpoint)
    candidates, _ = within_budget(context, 0, source)
    largest = max(candidates, key=lambda candidate: candidate.parameters).architecture
    require_memory_for(context, largest.config(source), source)
    context.folder.mkdir(parents=True, exist_ok=True)
    values = with_absolute_paths(recipe.as_dict(), Path.cwd())
    write_text(context.folder / RECIPE_FILE, json.dumps(values, indent=1) + "\n")


def _all_stages(context: Context) -> Compressed:
    teacher = correct(context)
    source, models = teacher, {}
    for index in range(len(context.recipe.targets)):
        name = context.recipe.target_name(index)
        source = models[name] = _one_target(context, index, source, teacher)
    from .outcome import evaluate_and_report  # heavy: evaluation, plots

    return Compressed(models, evaluate_and_report(context, teacher, models))


def _one_target(context: Context, index: int, source: Path, teacher: Path) -> Path:
    """A target from the checkpoint that it is cut from; the folder of the model."""
    name = context.recipe.target_name(index)
    scores = score_importance(context, name, source)
    shape = choose(context, index, source, scores, teacher)
    pruned = prune_target(context, name, source, scores, shape, selection_inputs(context, index))
    return distill_target(context, name, pruned, teacher)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
