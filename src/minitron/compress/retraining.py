"""The stages that train: the teacher's correction before everything else, and the distillation of each target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.hf import read_config
from ..distill.opening import open_distillation
from ..distill.recipe import distill
from ..train.adapters import choose_trained
from ..train.export import MODEL_FOLDER
from ..train.inputs import saved_model
from ..train.loop import Result, train
from ..train.memory import require_memory
from .context import Context
from .costs import training_flops
from .stages import StoppedError


def correct(context: Context) -> Path:
    """Fine-tune the recipe's model on the data, if the recipe wants that.

    Returns:
        The folder of the teacher to use.
    """
    recipe, settings, source = context.recipe, context.recipe.correction, context.checkpoint
    if settings.kind == "none":
        return source
    config = replace(recipe.train, steps=None, tokens=settings.tokens, hours=None, lr=settings.lr)
    inputs = {"teacher": context.fingerprint(source), "config": vars(config), "kind": settings.kind}
    shape = read_config(source)

    def work(folder: Path) -> dict[str, Any]:
        require_memory(shape, config, context.device, context.world, trained=None if settings.kind == "full" else 0)
        # peft draws its adapters beside weights that are loaded already.
        loaded = saved_model(source, context.device, None if settings.kind == "lora" else context.world)
        result = train(
            choose_trained(loaded, settings.kind), context.texts.stream, config, folder / "run",
            heldout=context.texts.heldout, tokenizer=context.tokenizer, quiet=context.quiet, world=context.world,
            export_dtype=context.out_dtype,
        )  # fmt: skip
        return _facts(result, training_flops(shape, None, result.tokens, config.sequence))

    context.stages.run("correct", {**inputs, "data": context.data_key}, work)
    return context.folder / "correct" / "run" / MODEL_FOLDER


def distill_target(context: Context, name: str, pruned: Path, teacher: Path) -> Path:
    """Retrain a pruned model by the teacher of all targets.

    Returns:
        The folder of the result.
    """
    config = context.recipe.train
    run = context.folder / name / "distill" / "run"
    inputs = {"pruned": context.fingerprint(pruned), "teacher": context.fingerprint(teacher), "config": vars(config)}

    def work(folder: Path) -> dict[str, Any]:
        pair = open_distillation(pruned, teacher, context.texts, config, context.device, context.world)
        shapes = read_config(pruned), pair.running
        result = distill(
            pair.student, pair.targets, pair.texts.stream, config, run, heldout=pair.texts.heldout,
            identity=pair.identity, tokenizer=pair.tokenizer, quiet=context.quiet, world=context.world,
            export_dtype=context.out_dtype,
        )  # fmt: skip
        return _facts(result, training_flops(*shapes, result.tokens, config.sequence))

    context.stages.run(f"{name}/distill", {**inputs, "data": context.data_key}, work)
    return run / MODEL_FOLDER


def _facts(result: Result, flops: float) -> dict[str, Any]:
    """What a training found, for its stage.

    Raises:
        StoppedError: a signal ended it early.
    """
    if result.stopped_by is not None:
        raise StoppedError(result.stopped_by)
    return {"tokens": result.tokens, "flops": flops, "heldout": result.heldout}
