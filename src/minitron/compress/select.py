"""From a budget to a shape: enumerate, score what would be cut, retrain the most promising for a while."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.hf import read_config
from ..config import NemotronConfig
from ..distill.targets import OnlineTeacher
from ..prune.architecture import Architecture
from ..prune.choose import make_plan
from ..prune.costs import machine_for, with_bandwidth
from ..prune.rank import rank_candidates, zero_shot
from ..prune.scores import Scores
from ..prune.search import Budget, Candidate, Machine, enumerate_architectures, thin_out, unused
from .costs import refit_flops, training_flops
from .cutting import cut_out
from .ranking import Contender, rank

if TYPE_CHECKING:
    from .run import Context


def short_name(shape: Architecture) -> str:
    """A shape as the name of a folder: `4L-192d-4h-2g-576f`."""
    return f"{shape.layers}L-{shape.hidden}d-{shape.heads}h-{shape.groups}g-{shape.ffn}f"


def selection_inputs(context: Context, index: int) -> dict[str, Any]:
    """What the choice of a shape depends on, for JSON."""
    target, ranking = context.recipe.targets[index], asdict(context.recipe.ranking)
    chosen_by = {"budget": list(target.budget), "ranking": ranking, "seed": context.recipe.train.seed}
    return {**chosen_by, "refit": context.recipe.calibration.refit}


def within_budget(context: Context, index: int, config: NemotronConfig) -> tuple[list[Candidate], str | None]:
    """Shapes that meet the budget of a target, thinned evenly to `ranking.scored`; a sentence if none is near it.

    Raises:
        SearchError: none does; says which are nearest.
    """
    kind, value = context.recipe.targets[index].budget
    if kind == "keep":
        return [Candidate.of(Architecture.parse(value, config), config, Machine())], None
    machine = machine_for(kind, config, context.out_dtype)
    if kind == "speed":
        machine = with_bandwidth(machine)
    budget = Budget.parse(kind, value)
    found = enumerate_architectures(config, budget, context.recipe.ranking.grid, machine)
    return thin_out(found, context.recipe.ranking.scored), unused(budget, found)


def choose(context: Context, index: int, source: Path, scores: Scores) -> Architecture:
    """The shape of a target."""
    name, config = context.recipe.target_name(index), read_config(source)
    mark = fingerprint(source)
    inputs = {"source": mark, **selection_inputs(context, index)}

    def score(folder: Path) -> dict[str, Any]:
        candidates, note = within_budget(context, index, config)
        notes = [] if note is None else [f"{name}: {note}"]
        for sentence in notes:
            context.say(sentence)
        if len(candidates) == 1:
            row = {"shape": candidates[0].architecture.as_dict(), "loss": None}
            return {"candidates": [row], "tokens": 0, "flops": 0.0, "notes": notes}
        blocks = context.scoring()
        ranked = rank_candidates(
            candidates,
            lambda shape: make_plan(config, scores, shape, source=mark),
            zero_shot(source, blocks, device=context.device),
            folder / "candidates.jsonl",
            lambda one, done: context.say(f"{name}: scored {done} of {len(candidates)} shapes"),
        )
        rows = [{"shape": r.candidate.architecture.as_dict(), "loss": r.score} for r in ranked if r.score == r.score]
        each = blocks.input_ids.numel()
        middle = candidates[len(candidates) // 2].architecture.config(config)
        flops = each * len(candidates) * float(middle.flops_per_token(context.recipe.train.sequence // 2))
        return {"candidates": rows, "tokens": each * len(candidates), "flops": flops, "notes": notes}

    found = context.stages.run(f"{name}/score", inputs, score)["candidates"]
    shapes = [Architecture.from_dict(row["shape"], f"{name}/score") for row in found]
    tried = spread(shapes, context.recipe.ranking.most)
    if len(tried) == 1:
        return tried[0]
    facts = _retrain(context, name, source, scores, tried, inputs)
    return Architecture.from_dict(facts["chosen"], f"{name}/rank")


def spread(shapes: Sequence[Architecture], most: int) -> list[Architecture]:
    """The first `most` of shapes that are sorted by their score, in turn of every depth, so that none is left out
    by scores that favour another depth before retraining."""
    by_depth: dict[int, list[Architecture]] = {}
    for shape in shapes:
        by_depth.setdefault(shape.layers, []).append(shape)
    lists = list(by_depth.values())
    taken: list[Architecture] = []
    for place in range(max(map(len, lists))):
        taken += [row[place] for row in lists if place < len(row)]
    return taken[:most]


def _retrain(
    context: Context, name: str, source: Path, scores: Scores, tried: Sequence[Architecture], inputs: dict[str, Any]
) -> dict[str, Any]:
    config, mark = read_config(source), fingerprint(source)
    recipe = context.recipe
    settings = replace(recipe.train, steps=None, hours=None, tokens=recipe.ranking.tokens)
    shapes = {short_name(shape): shape for shape in tried}
    teacher_mark = fingerprint(context.teacher)

    def contender(folder: Path, label: str) -> Contender:
        out = folder / "pruned" / label

        def load() -> Any:
            if not out.is_dir():
                cut_out(context, source, make_plan(config, scores, shapes[label], source=mark), out)
            return context.load(out)

        return Contender(label, load)

    def work(folder: Path) -> dict[str, Any]:
        def teacher() -> OnlineTeacher:
            return OnlineTeacher(context.load(context.teacher).requires_grad_(False))

        standing = rank(
            [contender(folder, label) for label in shapes], teacher, context.texts.stream, context.texts.heldout,
            settings, recipe.ranking.rungs, folder, hidden_size=read_config(context.teacher).hidden_size,
            identity={"teacher": teacher_mark},
            say=lambda text: context.say(f"{name}/rank: {text}"),
        )  # fmt: skip
        for label in shapes:
            shutil.rmtree(folder / label, ignore_errors=True)  # run folders: the losses are kept
        shutil.rmtree(folder / "pruned", ignore_errors=True)
        per_step = settings.tokens_per_step
        teacher_config = read_config(context.teacher)
        last = {label: max(losses) for label, losses in standing.losses.items()}
        flops = sum(
            training_flops(shapes[label].config(config), None, steps * per_step, settings.sequence)
            for label, steps in last.items()
        )
        if recipe.calibration.refit:
            tokens = recipe.calibration.blocks * settings.sequence
            flops += sum(refit_flops(config, s.config(config), tokens, settings.sequence) for s in tried)
        flops += standing.teacher_blocks * settings.sequence * teacher_config.flops_per_token(settings.sequence // 2)
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
