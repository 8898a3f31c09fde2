"""`compress`: the stages in their order, from a teacher and a budget to a smaller model with its report.

teacher (correction) -> for each target: importance -> candidates -> ranking -> pruning -> distillation by the
*original* teacher -> evaluation -> report. Each stage is a folder of the run (see `stages`), in the formats that the
single commands read and write.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.fingerprint import fingerprint
from ..checkpoint.hf import check_checkpoint, read_config
from ..data.documents import Source
from ..data.packing import Batch, collate
from ..data.token_cache import TokenFolder
from ..distill.losses import DistillLoss, DistillOptions
from ..distill.targets import OnlineTeacher
from ..files import is_empty, locked, require_apart, write_text
from ..loading import checkpoint_folder, pick_device
from ..prune.choose import make_plan
from ..prune.importance import check_language, compute_importance
from ..prune.scores import Scores
from ..tokenizer import load_tokenizer
from ..train.adapters import choose_trained
from ..train.inputs import Texts, open_texts, saved_model
from ..train.loop import train
from ..train.schedule import TrainConfig
from ..train.text_changes import describe_texts
from .costs import training_flops
from .cutting import cut_out, refit_costs
from .recipe import Recipe, RecipeError, with_absolute_paths
from .select import choose, selection_inputs, within_budget
from .stages import RunError, Stages, StoppedError

RECIPE_FILE = "recipe.json"
TOKEN_CACHE = "token-cache"


@dataclass(frozen=True)
class Compressed:
    """What a compression made."""

    models: dict[str, Path]
    """Name of each target to its checkpoint."""
    report: Path
    """The page; `report.json` lies beside it."""


@dataclass
class Context:
    """What all stages of a run use."""

    recipe: Recipe
    folder: Path
    stages: Stages
    teacher: Path
    tokenizer: Any
    texts: Texts
    device: torch.device
    say: Callable[[str], None]
    quiet: bool

    @property
    def out_dtype(self) -> torch.dtype:
        """Of the weights that are written: the teacher's."""
        found = getattr(read_config(self.teacher), "dtype", None)
        return found if isinstance(found, torch.dtype) else torch.float32

    def load(self, folder: Path) -> Any:
        """A checkpoint in fp32 on the device of the run."""
        return saved_model(folder, self.device)

    def calibration(self) -> Batch:
        """The first blocks of the training data, in its order."""
        blocks = self.recipe.calibration.blocks
        return self.texts.stream.batches(0, blocks, blocks)[0]

    def scoring(self) -> Batch:
        """Held-out blocks that candidates are scored on: the first of every text in turn."""
        wanted, held = self.recipe.ranking.score_blocks, list(self.texts.heldout.values())
        longest = max(map(len, held))
        pieces = [blocks.pieces(i) for i in range(longest) for blocks in held if i < len(blocks)][:wanted]
        return collate(pieces, self.recipe.train.sequence)


def compress(
    recipe: Recipe,
    out: Path,
    *,
    cache: Path | TokenFolder | None = None,
    device: str = "auto",
    quiet: bool = False,
    say: Callable[[str], None] | None = None,
) -> Compressed:
    """Make the models of a recipe, or go on where an earlier call was interrupted.

    Args:
        recipe: what to do.
        out: run folder; made if it is not there. It may be copied to another machine and continued there.
        cache: folder for tokenized text; `token-cache` in the run folder if None.
        device: where models run.
        quiet: no progress bars.
        say: is told what happens; stderr if None.

    Raises:
        RecipeError, RunError, ValueError: what is wrong with the recipe, the run folder, the checkpoint or the text.
        LockedError: another process is at work in the run folder.
        TargetError: the run folder overlaps with the checkpoint or the text.
        WriteError: the disk is full or refuses.
        StoppedError: SIGTERM or Ctrl-C, with everything saved.
    """
    with locked(out):
        return _compress(recipe, out, cache, device, quiet, say or _to_stderr)


def _compress(
    recipe: Recipe,
    out: Path,
    cache: Path | TokenFolder | None,
    device: str,
    quiet: bool,
    say: Callable[[str], None],
) -> Compressed:
    with token_folder(out, cache) as store:
        context = open_context(recipe, out, store, device, quiet, say)
        within_budget(context, 0, read_config(context.teacher))
        out.mkdir(parents=True, exist_ok=True)
        values = with_absolute_paths(recipe.as_dict(), Path.cwd())
        write_text(out / RECIPE_FILE, json.dumps(values, indent=1) + "\n")
        store.keep()
    context.teacher = correct(context)
    source, models = context.teacher, {}
    for index in range(len(recipe.targets)):
        source = one_target(context, index, source)
        models[recipe.target_name(index)] = source
    from .outcome import evaluate_and_report  # heavy: evaluation, plots

    return Compressed(models, evaluate_and_report(context, models))


def token_folder(out: Path, cache: Path | TokenFolder | None) -> TokenFolder:
    """Where the tokens of a run lie: `token-cache` in its folder if nothing else is said."""
    return cache if isinstance(cache, TokenFolder) else TokenFolder(cache or out / TOKEN_CACHE)


def open_context(
    recipe: Recipe, out: Path, cache: TokenFolder, device: str, quiet: bool, say: Callable[[str], None]
) -> Context:
    """Check what a recipe names, and open its text. Nothing is written but to the folder of tokens.

    Raises:
        RecipeError, RunError, ValueError: see `compress`.
    """
    place = pick_device(device)
    teacher = checkpoint_folder(recipe.model, say)
    text = [Path(Source.parse(text).path) for text in (*recipe.data, *recipe.heldout)]
    require_apart(out, [teacher, *text])
    require_apart(cache.path, text)
    check_checkpoint(teacher)
    config = read_config(teacher)
    if recipe.train.sequence > config.max_position_embeddings:
        raise RecipeError(
            f"train: sequence is {recipe.train.sequence}; the model's context is {config.max_position_embeddings}"
        )
    if out.exists() and not is_empty(out, but=(TOKEN_CACHE,)) and not (out / RECIPE_FILE).is_file():
        raise RunError(f"{out} is not empty and is not the folder of a compression (no {RECIPE_FILE}); choose another")
    tokenizer: Any = load_tokenizer(teacher)
    _check_prompts(recipe, tokenizer, config.max_position_embeddings)
    texts = open_texts(
        recipe.data, recipe.heldout, recipe.heldout_share, tokenizer, recipe.train, cache, recipe.field,
        recipe.encoding, recipe.skip_bad,
    )  # fmt: skip
    for note in texts.notes:
        say(f"note: {note}")
    there = len(texts.stream)
    if recipe.calibration.blocks > there:
        say(
            f"note: calibration: blocks is {recipe.calibration.blocks:,}; the data has {there:,} of "
            f"{recipe.train.sequence} tokens, and all of them are used"
        )
        recipe = replace(recipe, calibration=replace(recipe.calibration, blocks=there))
    stages = Stages(out, say, describe_texts(texts.stream))
    return Context(recipe, out, stages, teacher, tokenizer, texts, place, say, quiet)


def _check_prompts(recipe: Recipe, tokenizer: Any, context: int) -> None:
    """The report continues the prompts at the end of the run, which is too late to find that it cannot."""
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise RecipeError("the tokenizer has neither a bos nor an eos token; one of them has to stand before a text")
    for index, prompt in enumerate(recipe.prompts):
        length = 1 + len(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)
        if length >= context:
            raise RecipeError(f"prompts[{index}] has {length} tokens; the model's context is {context}")


# --- stages ------------------------------------------------------------------------------------------------------


def data_key(context: Context) -> dict[str, float]:
    """What tells the training text from another."""
    stream = context.texts.stream
    return {s.cache.key[:16]: w for s, w in zip(stream.sources, stream.weights, strict=True)}


def correct(context: Context) -> Path:
    """Fine-tune the teacher on the data, if the recipe wants that; the folder of the teacher to use."""
    recipe, settings = context.recipe, context.recipe.correction
    if settings.kind == "none":
        return context.teacher
    config = replace(recipe.train, steps=None, tokens=settings.tokens, hours=None, lr=settings.lr)
    inputs = {"teacher": fingerprint(context.teacher), "config": vars(config), "kind": settings.kind}

    def work(folder: Path) -> dict[str, Any]:
        model = choose_trained(context.load(context.teacher), settings.kind)
        heldout = context.texts.heldout
        result = train(
            model, context.texts.stream, config, folder / "run", heldout=heldout, tokenizer=context.tokenizer,
            quiet=context.quiet, export_dtype=context.out_dtype,
        )  # fmt: skip
        _went_through(result)
        teacher = read_config(context.teacher)
        return {
            "tokens": result.tokens,
            "flops": training_flops(teacher, None, result.tokens, config.sequence),
            "heldout": result.heldout,
        }

    context.stages.run("correct", {**inputs, "data": data_key(context)}, work)
    return context.folder / "correct" / "run" / "model"


def one_target(context: Context, index: int, source: Path) -> Path:
    """Importance, choice, pruning and distillation of one target; the folder of the model."""
    name = context.recipe.target_name(index)
    scores = measure_importance(context, name, source)
    pruned = prune_target(context, index, source, scores)
    return distill_target(context, name, pruned)


def measure_importance(context: Context, name: str, source: Path) -> Scores:
    """Scores of what the target is cut from."""
    path = context.folder / name / "importance" / "importance.safetensors"
    config = read_config(source)
    blocks = context.recipe.calibration.blocks
    inputs = {"source": fingerprint(source), "blocks": blocks, "data": data_key(context)}

    def work(folder: Path) -> dict[str, Any]:
        batch = context.calibration()
        check_language(batch, context.tokenizer)
        scores = compute_importance(source, batch, work=folder / "work", device=context.device)
        scores.save(path)
        tokens = blocks * context.recipe.train.sequence
        return {"tokens": tokens, "flops": tokens * config.flops_per_token(context.recipe.train.sequence // 2)}

    context.stages.run(f"{name}/importance", inputs, work)
    return Scores.load(path)


def prune_target(context: Context, index: int, source: Path, scores: Scores) -> Path:
    """Choose a shape within the budget and cut it out; the folder of the pruned checkpoint."""
    name = context.recipe.target_name(index)
    config, mark = read_config(source), fingerprint(source)
    shape = choose(context, index, source, scores)
    out = context.folder / name / "prune" / "model"

    def work(folder: Path) -> dict[str, Any]:
        plan = make_plan(config, scores, shape, source=mark)
        plan.save(folder / "plan.json")
        cut_out(context, source, plan, out)
        facts = {"plan": plan.hash, "shape": shape.as_dict(), "model": fingerprint(out)}
        return {**facts, **refit_costs(context, source, shape)}

    inputs = {"source": mark, "shape": shape.as_dict(), **selection_inputs(context, index)}
    context.stages.run(f"{name}/prune", inputs, work)
    return out


def distill_target(context: Context, name: str, pruned: Path) -> Path:
    """Retrain the pruned model by the original teacher; the folder of the result."""
    config: TrainConfig = context.recipe.train
    teacher_mark = fingerprint(context.teacher)
    run = context.folder / name / "distill" / "run"

    def work(folder: Path) -> dict[str, Any]:
        teacher = context.load(context.teacher).eval().requires_grad_(False)
        student = context.load(pruned)
        loss = DistillLoss(OnlineTeacher(teacher), DistillOptions(), student.config)
        result = train(
            student, context.texts.stream, config, run, heldout=context.texts.heldout, loss=loss,
            identity={"teacher": teacher_mark}, tokenizer=context.tokenizer, quiet=context.quiet,
            export_dtype=context.out_dtype,
        )  # fmt: skip
        _went_through(result)
        flops = training_flops(student.config, teacher.config, result.tokens, config.sequence)
        return {"tokens": result.tokens, "flops": flops, "heldout": result.heldout}

    inputs = {"pruned": fingerprint(pruned), "teacher": teacher_mark, "config": vars(config)}
    context.stages.run(f"{name}/distill", {**inputs, "data": data_key(context)}, work)
    return run / "model"


def _went_through(result: Any) -> None:
    if result.stopped_by is not None:
        raise StoppedError(result.stopped_by)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
