"""`minitron distill`: train a student from a teacher, or continue such a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..locate import locate
from . import training as options
from .common import MODEL_HELP, quiet_libraries, sentence_errors
from .quiet_option import with_quiet

# Typer reads the annotations at run time, where it wants Optional.
# ruff: noqa: UP045


@sentence_errors
@with_quiet
@options.with_run_options(lr=2e-4, schedule="cosine")
def distill(
    student: Annotated[str, typer.Argument(help=f"The model that learns. {MODEL_HELP}")],
    run: options.RunOptions,
    teacher: Annotated[Optional[str], typer.Option(help=f"The teacher. {MODEL_HELP}")] = None,
    teacher_cache: Annotated[
        Optional[Path],
        typer.Option(help="The teacher's outputs, from `minitron teacher-cache`; --teacher is optional then."),
    ] = None,
    loss: Annotated[str, typer.Option(help="Divergence of the logits: forward_kl, reverse_kl or jsd.")] = "forward_kl",
    temperature: Annotated[float, typer.Option(help="Divides the logits of both models.")] = 1.0,
    ce_weight: Annotated[float, typer.Option(help="Weight of the cross-entropy of the next token.")] = 0.0,
    hidden: Annotated[Optional[str], typer.Option(help="Compare hidden states too: cosine or mse.")] = None,
    layer_map: Annotated[
        Optional[list[str]],
        typer.Option(help="TEACHER:STUDENT layers to compare, from 0; repeatable. The third from the end by default."),
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="With --hidden: compare the embeddings too.")
    ] = False,
    alpha: Annotated[
        Optional[float], typer.Option(help="Weight of the hidden-state loss; by default both losses count equally.")
    ] = None,
    correct_teacher: Annotated[
        bool, typer.Option("--correct-teacher", help="Train the teacher on the same text while it teaches.")
    ] = False,
    corrected_lr: Annotated[
        float, typer.Option(help="With --correct-teacher: its learning rate, as a share of the student's.")
    ] = 0.2,
) -> None:
    """Distil a student from a teacher with the same tokenizer.

    The same command again continues an interrupted run, bit for bit. Ctrl-C saves first. The trained model is the
    folder `model` in the run folder. Under torchrun the student is sharded over the processes.

    Examples:

      minitron distill student --teacher teacher --data corpus/ --heldout-share 0.01 --steps 1000 --out runs/kd

      minitron distill pruned --teacher 15b --data web.jsonl:3 --data code.jsonl --tokens 2000000000 --batch 1152
      --micro-batch 4 --sequence 4096 --recompute mlp --out runs/kd

      torchrun --nproc-per-node 8 -m minitron distill pruned --teacher 15b --data corpus/ --steps 400 --out runs/kd
    """
    settings = run.settings()
    run.check_run([student, teacher, teacher_cache])
    for name in [student] if teacher is None else [student, teacher]:
        locate(name)
    quiet_libraries()
    from ..distill.losses import DistillOptions

    losses = DistillOptions(loss, temperature, ce_weight, hidden, _pairs(layer_map), embeddings, alpha)
    with options.processes(run.device, run.tensor_parallel) as (world, place):
        from ..data.token_cache import TokenFolder
        from ..distill.opening import open_distillation

        with TokenFolder(run.cache_folder) as store:
            pair = open_distillation(
                student,
                teacher,
                run.data,
                settings,
                place,
                world,
                heldout=run.heldout or [],
                heldout_share=run.heldout_share,
                cache=store,
                **run.reading,
                correct_teacher=correct_teacher,
                teacher_cache=teacher_cache,
            )
            _run(run, pair, losses, settings, world, place, corrected_lr, store.keep)


def _pairs(texts: list[str] | None) -> tuple[tuple[int, int], ...] | None:
    """`["29:13"]` as numbers."""
    if not texts:
        return None
    pairs = []
    for text in texts:
        parts = text.split(":")
        if len(parts) != 2 or not all(part.isdigit() for part in parts):
            raise ValueError(f"--layer-map is {text!r}; it must be TEACHER:STUDENT, two layer numbers from 0")
        pairs.append((int(parts[0]), int(parts[1])))
    return tuple(pairs)


def _run(
    run: options.RunOptions,
    pair: Any,
    losses: Any,
    settings: Any,
    world: Any,
    place: Any,
    corrected_lr: float,
    accepted: Callable[[], None],
) -> None:
    from ..distill.recipe import distill, make_loss
    from ..shapes import training_flops_per_token

    net = pair.student
    flops = training_flops_per_token(net.config, settings.sequence, pair.running, pair.corrected)
    loss = make_loss(pair.targets, losses, net, corrected_lr) if world.mesh is None else None
    with_loss = options.Measured(net, pair.texts.stream, loss, flops)
    peak, need = options.prepare(run, pair.texts.notes, with_loss, settings, world, place)
    result = distill(
        net,
        pair.targets,
        pair.texts.stream,
        settings,
        run.out,
        options=losses,
        teacher=pair.teacher,
        corrected_lr=corrected_lr,
        heldout=pair.texts.heldout,
        identity=pair.identity,
        tokenizer=pair.tokenizer,
        quiet=run.as_json,
        world=world,
        export_dtype=pair.export_dtype,
        peak_flops=peak,
        extend=run.extend,
        accepted=accepted,
    )
    if world.first:
        options.report(result, need, run.as_json)
