"""What `train` and `distill` share: options, settings, the start in one process or many, and what they tell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer

from ..files import require_apart, require_folder_name, require_unlocked
from .common import human_bytes, human_count, print_json

DataOption = typer.Option(
    help="PATH[:WEIGHT] of text: a file, folder or pattern (txt, md, jsonl, json, each also .gz, .xz, .bz2 or .zst; "
    "parquet, arrow); repeatable."
)
EncodingOption = typer.Option("utf-8", help="Encoding of text without a byte-order mark, as cp1252 or shift_jis.")
SkipBadOption = typer.Option(False, "--skip-bad", help="Leave out documents that cannot be read, instead of stopping.")
ExtendOption = typer.Option(
    False, "--extend", help="Lengthen the run in the run folder to the length given; the other settings stay."
)
FieldOption = typer.Option("text", help="Field or column that holds the text, in files that have some.")
RunOption = typer.Option("--out", "-o", help="Run folder; an interrupted run in it is continued.")
HeldoutOption = typer.Option(help="Text whose loss is measured and never trained on; repeatable.")
HeldoutShareOption = typer.Option(0.0, help="Share of the training documents to hold out, 0 to 1.")
CacheOption = typer.Option(help="Folder for tokenized text; beside the run folder by default.")
StepsOption = typer.Option(None, help="Length of the run in optimizer steps.")
TokensOption = typer.Option(None, help="Or in tokens.")
HoursOption = typer.Option(None, help="Or in hours of training; the schedule follows the clock.")
BatchOption = typer.Option(32, help="Sequences per optimizer step, of all processes together.")
MicroBatchOption = typer.Option(None, help="Sequences per forward pass of a process; all of them by default.")
SequenceOption = typer.Option(512, help="Tokens per sequence.")
ScheduleOption = typer.Option("wsd", help="wsd (warmup, stable, decay), cosine or constant.")
WarmupOption = typer.Option(100, help="Steps over which the learning rate rises.")
DecayOption = typer.Option(0.2, help="Share of the run in which wsd goes down to the final rate.")
FinalLrOption = typer.Option(0.0, help="Learning rate at the end, as a share of the highest.")
WeightDecayOption = typer.Option(0.1, help="AdamW's decay of matrices.")
ClipOption = typer.Option(1.0, help="Largest norm of the gradient; 0 for any.")
SeedOption = typer.Option(0, help="Decides the initial weights and the order of the data.")
EvalEveryOption = typer.Option(500, help="Steps between held-out losses; 0 for only one at the end.")
SaveEveryOption = typer.Option(500, help="Steps between checkpoints; 0 for only one at the end.")
KeepOption = typer.Option(2, help="Checkpoints to keep.")
DtypeOption = typer.Option("auto", help="auto, bfloat16 or float32, of matrix products; weights stay in float32.")
OptimizerOption = typer.Option("adamw", help="adamw; adamw8bit (torchao); offload: its state on the CPU (GPUs).")
RecomputeOption = typer.Option("none", help="none; mlp: less memory, nearly as fast; layers: least memory.")
CompileOption = typer.Option(False, "--compile", help="Compile the layers with torch.compile.")
OnSpikeOption = typer.Option("stop", help="After a NaN or a spike: stop, or skip the batch.")
SpikeOption = typer.Option(0.0, help="A gradient this many times longer than usual is a spike; 0: none is.")
TensorParallelOption = typer.Option(1, help="Processes that share each matrix (torchrun).")
PeakOption = typer.Option(None, help="Peak TFLOP/s of a device, for MFU; measured if left out.")


def tell(notes: Iterable[str]) -> None:
    """Say on stderr what was left out of the text."""
    for note in notes:
        typer.echo(f"note: {note}", err=True)


def check_run(out: Path, models: Iterable[str | Path | None], data: Sequence[str], cache: Path | None) -> None:
    """Refuse a run folder, before any work is done, that another run uses or that overlaps with what is read.

    Raises:
        TargetError, LockedError: see `files`.
    """
    from ..data.documents import Source

    text = [Path(Source.parse(each).path) for each in data]
    require_folder_name(out)
    require_apart(out, [*(Path(model) for model in models if model is not None), *text])
    if cache is not None:
        require_apart(cache, text)
    require_unlocked(out)


def settings_from(options: dict[str, Any]) -> Any:
    """`TrainConfig` of what a verb was called with."""
    from ..train.schedule import TrainConfig

    return TrainConfig(**{f.name: options[f.name] for f in fields(TrainConfig) if f.name in options})


@contextmanager
def processes(device: str, tensor_parallel: int, patience_hours: float = 1) -> Iterator[tuple[Any, Any]]:
    """(world, device) of this process, which torchrun may have started among others.

    An error is reported by the process that fails first; the others end without a word, since they fail because of it.

    Args:
        device: as on the command line.
        tensor_parallel: as of `make_world`.
        patience_hours: how long a process waits for the others; the first one may work alone that long.
    """
    from ..loading import pick_device
    from ..train.machine import keep_freed_memory
    from ..train.parallel import make_world
    from ..world import fails_first, join, launched, leave

    keep_freed_memory()
    if launched():
        join(device, patience_hours)
    try:
        place = pick_device(device)
        yield make_world(tensor_parallel, place), place
    except typer.Exit:
        raise
    except Exception:
        if not fails_first():
            raise typer.Exit(1) from None
        raise
    finally:
        leave()


def peak_flops(given: float | None, place: Any, dtype: str, world: Any) -> float:
    """Operations per second of all devices together: as given for one in TFLOP/s, or measured."""
    from ..train.machine import measured_peak

    return world.size * (given * 1e12 if given else world.agree(measured_peak(place, dtype)))


def announce(need: Any, stream: Any, settings: Any, count: int, peak: float, flops: float, how: str) -> dict[str, Any]:
    """Say on stderr how long the run will take and what memory it needs, as one measured step suggests."""
    steps = settings.total_steps or int(3600 * settings.hours / need.seconds_per_step)
    tokens = steps * settings.tokens_per_step
    speed = settings.tokens_per_step / need.seconds_per_step
    typer.echo(
        f"{human_count(count)} parameters. About {steps:,} steps, {human_count(tokens)} tokens: "
        f"{steps * settings.batch / len(stream):.1f} passes over the data, {tokens / count:.1f} tokens per parameter. "
        f"About {steps * need.seconds_per_step / 3600:.2f} hours at {speed:,.0f} tokens/s, "
        f"MFU {speed * flops / peak:.0%} of the {how} {peak / 1e12:.3g} TFLOP/s, "
        f"{human_bytes(need.peak_bytes)} of memory.",
        err=True,
    )
    return {"steps": steps, "seconds_per_step": need.seconds_per_step, "peak_bytes": need.peak_bytes}


def report(result: Any, estimate: dict[str, Any] | None, as_json: bool) -> None:
    """What a run ended with, on stdout."""
    if as_json:
        row = {name: str(value) if isinstance(value, Path) else value for name, value in vars(result).items()}
        print_json({**row, "estimate": estimate})
        return
    typer.echo(f"step {result.step:,}, {human_count(result.tokens)} tokens; checkpoint: {result.checkpoint}")
    for name, scores in result.heldout.items():
        parts = [f"{scores['nats_per_token']:.4f} nats per token", f"{scores['bits_per_byte']:.4f} bits per byte"]
        parts += [f"KL {scores['kl']:.4f}"] if "kl" in scores else []
        parts += [f"top-1 {scores['top1']:.1%}"] if "top1" in scores else []
        typer.echo(f"{name}: {', '.join(parts)}")
    if result.skipped:
        typer.echo(f"{result.skipped} updates were left out")
    if result.stopped_by:
        typer.echo(f"stopped by {result.stopped_by}; the same command continues the run")
    else:
        typer.echo(f"model: {result.model}")
