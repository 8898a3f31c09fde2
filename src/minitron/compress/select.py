"""From a budget to a shape: enumerate, score what would be cut, retrain the most promising for a while."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.hf import read_config
from ..config import ModelConfig
from ..distill.targets import OnlineTeacher
from ..prune.architecture import Architecture
from ..prune.choose import make_plan
from ..prune.costs import machine_for
from ..prune.scores import Scores
from ..prune.search import Budget, Candidate, Machine, thin_out
from ..prune.steps import find_candidates, rank_zero_shot
from ..shapes import describe
from ..train.inputs import saved_model
from ..train.machine import uses_bfloat16
from ..train.memory import require_memory
from ..train.run_folder import TrainError
from .context import Context
from .costs import training_flops
from .cutting import compensation_costs, cut_out
from .ranking import Contender, Standing, rank
from .recipe import RecipeError


def short_name(shape: Architecture) -> str:
    """A shape as the name of a folder: `4L-192d-4h-2g-576f`."""
    return f"{shape.layers}L-{shape.hidden}d-{shape.heads}h-{shape.groups}g-{shape.ffn}f"


def selection_inputs(context: Context, index: int) -> dict[str, Any]:
    """What the choice of a shape depends on, for JSON."""
    target, ranking = context.recipe.targets[index], asdict(context.recipe.ranking)
    chosen_by = {"budget": list(target.budget), "ranking": ranking, "seed": context.recipe.train.seed}
    return {**chosen_by, "compensation": context.recipe.calibration.compensation}


def within_budget(
    context: Context, index: int, config: ModelConfig, *, try_engine: bool = False
) -> tuple[list[Candidate], tuple[str, ...]]:
    """Shapes that meet the budget of a target, thinned evenly to `ranking.scored`, and sentences about them.

    Args:
        try_engine: as of `find_candidates`.

    Raises:
        SearchError: no shape meets it; says which are nearest.
    """
    kind, value = context.recipe.targets[index].budget
    if kind == "keep":
        return [Candidate.of(Architecture.parse(value, config), config, Machine())], ()
    machine = machine_for(kind, config, context.out_dtype)
    grid = context.recipe.ranking.grid
    found = find_candidates(config, Budget.parse(kind, value), machine, grid, try_engine=try_engine)
    return thin_out(found.candidates, context.recipe.ranking.scored), found.notes


def require_memory_for(context: Context, shape: ModelConfig, teacher: ModelConfig) -> None:
    """Refuse a shape that cannot be distilled from a teacher in the memory that is free.

    Raises:
        RecipeError: says what is needed and which setting would fit.
    """
    try:
        require_memory(shape, context.recipe.train, context.device, context.world, teacher)
    except TrainError as error:
        raise RecipeError(f"train: {error}; in a recipe these settings are fields of train") from None


def choose(context: Context, index: int, source: Path, scores: Scores, teacher: Path) -> Architecture:
    """The shape of a target that is cut from `source` and retrained by `teacher`."""
    name, config = context.recipe.target_name(index), read_config(source)
    mark = context.fingerprint(source)
    inputs = {"source": mark, **selection_inputs(context, index)}

    def score(folder: Path) -> dict[str, Any]:
        candidates, found = within_budget(context, index, config, try_engine=True)
        notes = [f"{name}: {note}" for note in found]
        for sentence in notes:
            context.say(sentence)
        if len(candidates) == 1:
            row = {"shape": candidates[0].architecture.as_dict(), "loss": None}
            return {"candidates": [row], "tokens": 0, "flops": 0.0, "notes": notes}
        blocks = context.scoring()
        ranked = rank_zero_shot(
            source, candidates, lambda shape: make_plan(config, scores, shape, source=mark), blocks,
            folder / "candidates.jsonl", device=context.device,
            progress=lambda _, done: context.say(f"{name}: scored {done} of {len(candidates)} shapes"),
        )  # fmt: skip
        rows = [{"shape": r.candidate.architecture.as_dict(), "loss": r.score} for r in ranked if r.score == r.score]
        each = blocks.input_ids.numel()
        middle = candidates[len(candidates) // 2].architecture.config(config)
        flops = each * len(candidates) * float(describe(middle).flops_per_token(context.recipe.train.sequence // 2))
        return {"candidates": rows, "tokens": each * len(candidates), "flops": flops, "notes": notes}

    world = context.world
    facts = context.stages.run(f"{name}/score", inputs, lambda folder: world.first_does(lambda: score(folder)))
    shapes = [Architecture.from_dict(row["shape"], f"{name}/score") for row in facts["candidates"]]
    tried = spread(shapes, context.recipe.ranking.most)
    if len(tried) == 1:
        return tried[0]
    ranked = _retrain(context, name, source, scores, tried, inputs, teacher)
    return Architecture.from_dict(ranked["chosen"], f"{name}/rank")


def spread(shapes: Sequence[Architecture], most: int) -> list[Architecture]:
    """The first `most` of shapes that are sorted by their score, taken from each depth in turn: scores before
    retraining favour some depths, and none is dropped for that."""
    by_depth: dict[int, list[Architecture]] = {}
    for shape in shapes:
        by_depth.setdefault(shape.layers, []).append(shape)
    lists = list(by_depth.values())
    taken: list[Architecture] = []
    for position in range(max(map(len, lists))):
        taken += [row[position] for row in lists if position < len(row)]
    return taken[:most]


def _retrain(
    context: Context,
    name: str,
    source: Path,
    scores: Scores,
    tried: Sequence[Architecture],
    inputs: dict[str, Any],
    teacher: Path,
) -> dict[str, Any]:
    """The stage that ranks shapes by retraining them."""
    config, mark, teacher_mark = read_config(source), context.fingerprint(source), context.fingerprint(teacher)
    recipe, world = context.recipe, context.world
    settings = replace(recipe.train, steps=None, hours=None, tokens=recipe.ranking.tokens)
    shapes = {short_name(shape): shape for shape in tried}

    def contender(folder: Path, label: str) -> Contender:
        out = folder / "pruned" / label

        def load() -> Any:
            if not world.first_does(out.is_dir):
                cut_out(context, source, make_plan(config, scores, shapes[label], source=mark), out)
            return saved_model(out, context.device, world)

        return Contender(label, load)

    def load_teacher() -> OnlineTeacher:
        dtype = torch.bfloat16 if uses_bfloat16(context.device, settings.dtype) else torch.float32
        return OnlineTeacher(saved_model(teacher, context.device, world, dtype).requires_grad_(False))

    def work(folder: Path) -> dict[str, Any]:
        standing = rank(
            [contender(folder, label) for label in shapes], load_teacher, context.texts.stream, context.texts.heldout,
            settings, recipe.ranking.rungs, folder, hidden_size=read_config(teacher).hidden_size,
            identity={"teacher": teacher_mark}, world=world,
            say=lambda text: context.say(f"{name}/rank: {text}"),
        )  # fmt: skip
        if world.first:
            for finished in (*shapes, "pruned"):  # the losses are kept
                shutil.rmtree(folder / finished, ignore_errors=True)
        flops = _flops(context, source, read_config(teacher), shapes, standing)
        per_step = settings.tokens_per_step
        return {
            "chosen": shapes[standing.order[0]].as_dict(),
            "order": list(standing.order),
            "losses": {k: {str(s * per_step): x for s, x in v.items()} for k, v in standing.losses.items()},
            "shapes": {label: shape.as_dict() for label, shape in shapes.items()},
            "teacher_blocks": standing.teacher_blocks,
            "student_blocks": standing.student_blocks,
            "tokens": standing.student_blocks * settings.sequence,
            "flops": flops,
        }

    more = {"tried": list(shapes), "teacher": teacher_mark, "config": asdict(settings)}
    return context.stages.run(f"{name}/rank", {**inputs, **more}, work)


def _flops(
    context: Context, source: Path, teacher: ModelConfig, shapes: dict[str, Architecture], standing: Standing
) -> float:
    """Of a ranking: the candidates' training and compensation, and the teacher's passes."""
    config, settings = read_config(source), context.recipe.train
    flops = (
        standing.teacher_blocks * settings.sequence * float(describe(teacher).flops_per_token(settings.sequence // 2))
    )
    for label, shape in shapes.items():
        tokens = max(standing.losses[label]) * settings.tokens_per_step
        flops += training_flops(shape.config(config), None, tokens, settings.sequence)
        flops += compensation_costs(context, source, shape).get("flops", 0.0)
    return flops
