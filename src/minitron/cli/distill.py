"""`minitron distill`: train a student from a teacher, or continue such a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..locate import locate
from . import training as options
from .common import MODEL_HELP, DeviceOption, JsonOption, quiet_libraries, sentence_errors

# Typer reads the annotations at run time, where it wants Optional.
# ruff: noqa: UP045


@sentence_errors
def distill(
    student: Annotated[str, typer.Argument(help=f"The model that learns: {MODEL_HELP}")],
    data: Annotated[list[str], options.DataOption],
    out: Annotated[Path, options.RunOption],
    teacher: Annotated[Optional[str], typer.Option(help=f"The teacher: {MODEL_HELP}")] = None,
    teacher_cache: Annotated[
        Optional[Path], typer.Option(help="Its answers, from `minitron teacher-cache`; then it need not be there.")
    ] = None,
    heldout: Annotated[Optional[list[str]], options.HeldoutOption] = None,
    heldout_share: float = options.HeldoutShareOption,
    field: str = options.FieldOption,
    encoding: str = options.EncodingOption,
    skip_bad: bool = options.SkipBadOption,
    cache: Annotated[Optional[Path], options.CacheOption] = None,
    loss: str = typer.Option("forward_kl", help="Divergence of the logits: forward_kl, reverse_kl or jsd."),
    temperature: float = typer.Option(1.0, help="Divides the logits of both."),
    ce_weight: float = typer.Option(0.0, help="Weight of the next token's cross-entropy beside it."),
    hidden: Optional[str] = typer.Option(None, help="Compare hidden states too: cosine or mse."),
    layer_map: Annotated[
        Optional[list[str]], typer.Option(help="TEACHER:STUDENT layers compared, from 0; repeatable. Last-2 of both.")
    ] = None,
    embeddings: bool = typer.Option(False, "--embeddings", help="With --hidden: compare the embeddings too."),
    alpha: Optional[float] = typer.Option(None, help="Weight of hidden states; by default so that both losses agree."),
    correct_teacher: bool = typer.Option(False, "--correct-teacher", help="The teacher learns the same text beside."),
    corrected_lr: float = typer.Option(0.2, help="Its learning rate, as a share of the student's."),
    steps: Optional[int] = options.StepsOption,
    tokens: Optional[int] = options.TokensOption,
    hours: Optional[float] = options.HoursOption,
    batch: int = options.BatchOption,
    micro_batch: Optional[int] = options.MicroBatchOption,
    sequence: int = options.SequenceOption,
    lr: float = typer.Option(2e-4, help="Highest learning rate."),
    schedule: str = typer.Option("cosine", help="wsd (warmup, stable, decay), cosine or constant."),
    warmup: int = options.WarmupOption,
    decay: float = options.DecayOption,
    final_lr: float = options.FinalLrOption,
    weight_decay: float = options.WeightDecayOption,
    clip: float = options.ClipOption,
    seed: int = options.SeedOption,
    eval_every: int = options.EvalEveryOption,
    save_every: int = options.SaveEveryOption,
    keep: int = options.KeepOption,
    extend: bool = options.ExtendOption,
    dtype: str = options.DtypeOption,
    optimizer: str = options.OptimizerOption,
    recompute: str = options.RecomputeOption,
    compile: bool = options.CompileOption,
    on_spike: str = options.OnSpikeOption,
    spike: float = options.SpikeOption,
    tensor_parallel: int = options.TensorParallelOption,
    peak_tflops: Optional[float] = options.PeakOption,
    device: str = DeviceOption,
    as_json: bool = JsonOption,
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
    settings = options.settings_from(locals())
    options.check_run(out, [student, teacher, teacher_cache], [*data, *(heldout or [])], cache)
    for name in [student] if teacher is None else [student, teacher]:
        locate(name)
    quiet_libraries()
    from ..distill.losses import DistillOptions

    losses = DistillOptions(loss, temperature, ce_weight, hidden, _pairs(layer_map), embeddings, alpha)
    with options.processes(device, tensor_parallel) as (world, place):
        from ..data.token_cache import TokenFolder
        from ..distill.opening import open_distillation

        with TokenFolder(cache or out.parent / "token-cache") as store:
            pair = open_distillation(
                student,
                teacher,
                data,
                settings,
                place,
                world,
                heldout=heldout or [],
                heldout_share=heldout_share,
                cache=store,
                field=field,
                encoding=encoding,
                skip_bad=skip_bad,
                correct_teacher=correct_teacher,
                teacher_cache=teacher_cache,
            )
            _run(pair, losses, settings, out, world, place, corrected_lr, peak_tflops, as_json, extend, store.keep)


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
    pair: Any,
    losses: Any,
    settings: Any,
    out: Path,
    world: Any,
    place: Any,
    corrected_lr: float,
    peak_tflops: float | None,
    as_json: bool,
    extend: bool,
    accepted: Callable[[], None],
) -> None:
    from ..distill.recipe import distill, flops_per_token, make_loss
    from ..train.loop import estimate

    if world.first:
        options.tell(pair.texts.notes)
    peak = options.peak_flops(peak_tflops, place, settings.dtype, world)
    need: dict[str, Any] | None = None
    if world.mesh is None:
        loss = make_loss(pair.targets, losses, pair.student, corrected_lr)
        measured = estimate(pair.student, pair.texts.stream, settings, loss)
        flops = flops_per_token(pair.student.config, settings.sequence, pair.running, pair.corrected)
        count = sum(p.numel() for p in pair.student.parameters())
        how = "given" if peak_tflops else "measured"
        need = options.announce(measured, pair.texts.stream, settings, count, peak, flops, how)
    result = distill(
        pair.student,
        pair.targets,
        pair.texts.stream,
        settings,
        out,
        options=losses,
        teacher=pair.teacher,
        corrected_lr=corrected_lr,
        heldout=pair.texts.heldout,
        identity=pair.identity,
        tokenizer=pair.tokenizer,
        quiet=as_json,
        world=world,
        export_dtype=pair.export_dtype,
        peak_flops=peak,
        extend=extend,
        accepted=accepted,
    )
    if world.first:
        options.report(result, need, as_json)
