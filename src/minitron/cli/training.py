"""What `train` and `distill` share: options, settings, the start in one process or many, and what they print."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Optional, TypeVar, get_type_hints

import typer

from ..files import require_apart, require_folder_name, require_unlocked
from .common import DEVICE_HELP, JSON_HELP, human_bytes, human_count, print_json

F = TypeVar("F", bound=Callable[..., Any])

# Typer reads the annotations at run time, where it wants Optional.
# ruff: noqa: UP045

# `teacher-cache` has these too.
DataOption = typer.Option(
    help="PATH[:WEIGHT] of text: a file, folder or pattern (txt, md, jsonl, json, each also .gz, .xz, .bz2 or .zst; "
    "parquet, arrow); repeatable."
)
EncodingOption = typer.Option(help="Encoding of text without a byte-order mark, as cp1252 or shift_jis.")
SkipBadOption = typer.Option("--skip-bad", help="Skip documents that cannot be read instead of stopping.")
FieldOption = typer.Option(help="Field or column that holds the text, in files that have some.")
HeldoutShareOption = typer.Option(help="Share of the training documents to hold out, 0 to 1.")
CacheOption = typer.Option(help="Folder for tokenized text; beside the run folder by default.")
SequenceOption = typer.Option(help="Tokens per sequence.")
SeedOption = typer.Option(help="Decides the initial weights and the order of the data.")


@dataclass
class RunOptions:
    """Options of every verb that trains, in the order of --help, with their defaults.

    Those with the name of a field of `TrainConfig` are its settings.
    """

    data: Annotated[list[str], DataOption]
    out: Annotated[Path, typer.Option("--out", "-o", help="Run folder; an interrupted run in it is continued.")]
    heldout: Annotated[
        Optional[list[str]], typer.Option(help="Text whose loss is measured and never trained on; repeatable.")
    ] = None
    heldout_share: Annotated[float, HeldoutShareOption] = 0.0
    field: Annotated[str, FieldOption] = "text"
    encoding: Annotated[str, EncodingOption] = "utf-8"
    skip_bad: Annotated[bool, SkipBadOption] = False
    cache: Annotated[Optional[Path], CacheOption] = None
    steps: Annotated[Optional[int], typer.Option(help="Length of the run in optimizer steps.")] = None
    tokens: Annotated[Optional[int], typer.Option(help="Length of the run in tokens.")] = None
    hours: Annotated[
        Optional[float], typer.Option(help="Length of the run in hours of training; the schedule follows the clock.")
    ] = None
    batch: Annotated[int, typer.Option(help="Sequences per optimizer step, of all processes together.")] = 32
    micro_batch: Annotated[
        Optional[int], typer.Option(help="Sequences per forward pass of a process; all of them by default.")
    ] = None
    sequence: Annotated[int, SequenceOption] = 512
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3
    schedule: Annotated[str, typer.Option(help="wsd (warmup, stable, decay), cosine or constant.")] = "wsd"
    warmup: Annotated[int, typer.Option(help="Steps over which the learning rate rises.")] = 100
    decay: Annotated[float, typer.Option(help="Share of the run in which wsd goes down to the final rate.")] = 0.2
    final_lr: Annotated[float, typer.Option(help="Learning rate at the end, as a share of the highest.")] = 0.0
    weight_decay: Annotated[float, typer.Option(help="AdamW's decay of matrices.")] = 0.1
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0 for any.")] = 1.0
    seed: Annotated[int, SeedOption] = 0
    eval_every: Annotated[int, typer.Option(help="Steps between held-out losses; 0 for only one at the end.")] = 500
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0 for only one at the end.")] = 500
    keep: Annotated[int, typer.Option(help="Checkpoints to keep.")] = 2
    extend: Annotated[
        bool,
        typer.Option("--extend", help="Lengthen the run in the run folder to the length given; other settings stay."),
    ] = False
    dtype: Annotated[str, typer.Option(help="auto, bf16 or fp32, of matrix products; weights stay in fp32.")] = "auto"
    optimizer: Annotated[
        str, typer.Option(help="adamw; adamw8bit (torchao); offload: its state on the CPU (GPUs).")
    ] = "adamw"
    recompute: Annotated[str, typer.Option(help="none; mlp: less memory, nearly as fast; layers: least memory.")] = (
        "none"
    )
    compile: Annotated[bool, typer.Option("--compile", help="Compile the layers with torch.compile.")] = False
    on_spike: Annotated[str, typer.Option(help="After a NaN or a spike: stop, or skip the batch.")] = "stop"
    spike: Annotated[
        float, typer.Option(help="A gradient this many times longer than usual is a spike; 0: none is.")
    ] = 0.0
    tensor_parallel: Annotated[int, typer.Option(help="Processes that share each matrix (torchrun).")] = 1
    peak_tflops: Annotated[
        Optional[float],
        typer.Option(help="Peak TFLOP/s of a device, for MFU; by default of its data sheet (GPUs) or measured (CPUs)."),
    ] = None
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "auto"
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False

    def settings(self) -> Any:
        """The `TrainConfig`."""
        from ..train.schedule import TrainConfig

        return TrainConfig(**{f.name: getattr(self, f.name) for f in fields(TrainConfig) if hasattr(self, f.name)})

    def check_run(self, models: Iterable[str | Path | None]) -> None:
        """`check_run` with the data, the held-out text and the cache of these options."""
        check_run(self.out, models, [*self.data, *(self.heldout or [])], self.cache)

    @property
    def cache_folder(self) -> Path:
        """Where tokenized text goes."""
        return self.cache or self.out.parent / "token-cache"

    @property
    def reading(self) -> dict[str, Any]:
        """How text is read, as arguments of `open_texts`."""
        return {"field": self.field, "encoding": self.encoding, "skip_bad": self.skip_bad}


def with_run_options(without: Sequence[str] = (), **defaults: Any) -> Callable[[F], F]:
    """Let the parameter `run` of a verb stand for all of `RunOptions`, some with another default.

    Typer sees the verb's own options first, as they are written, then the shared ones. Those `without` are no options
    of the verb and keep their defaults.
    """

    def decorate(verb: F) -> F:
        own = inspect.signature(verb, eval_str=True)
        hints = get_type_hints(RunOptions, include_extras=True)
        shared = []
        for option in fields(RunOptions):
            if option.name in without:
                continue
            default = defaults.get(
                option.name, inspect.Parameter.empty if option.default is MISSING else option.default
            )
            shared.append(
                inspect.Parameter(
                    option.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[option.name]
                )
            )
        kept = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.parameters.values() if p.name != "run"]

        @functools.wraps(verb)
        def expanded(**given: Any) -> Any:
            run = RunOptions(**{p.name: given.pop(p.name, p.default) for p in shared})
            return verb(run=run, **given)

        required = [p for p in (*kept, *shared) if p.default is inspect.Parameter.empty]
        optional = [p for p in (*kept, *shared) if p.default is not inspect.Parameter.empty]
        expanded.__signature__ = inspect.Signature([*required, *optional])  # type: ignore[attr-defined]
        expanded.__annotations__ = {p.name: p.annotation for p in (*kept, *shared)}
        return expanded  # type: ignore[return-value]

    return decorate


def tell(notes: Iterable[str]) -> None:
    """Say on stderr what was skipped of the text."""
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


@dataclass(frozen=True)
class Measured:
    """A model with its data and its loss, of which one step is measured before the run begins."""

    model: Any
    stream: Any
    loss: Any
    flops_per_token: float


def prepare(
    run: RunOptions, notes: Iterable[str], subject: Measured, settings: Any, world: Any, place: Any
) -> tuple[float | None, dict[str, Any] | None]:
    """Print notes on the text and, in one process, how long the run takes and what memory it needs.

    Returns:
        Operations per second of all devices, None if they are not known; and what was printed as numbers.
    """
    from ..train.loop import estimate

    if world.first:
        tell(notes)
    peak = peak_flops(run.peak_tflops, place, settings.dtype, world)
    if world.mesh is not None:
        return peak, None
    cost = estimate(subject.model, subject.stream, settings, subject.loss)
    count = sum(p.numel() for p in subject.model.parameters())
    how = "given" if run.peak_tflops else "measured" if place.type != "cuda" else "specified"
    return peak, announce(cost, subject.stream, settings, count, peak, subject.flops_per_token, how)


def peak_flops(given: float | None, place: Any, dtype: str, world: Any) -> float | None:
    """Operations per second of all devices together, None if not known: as given for one in TFLOP/s, or `peak_of`."""
    from ..train.machine import peak_of

    # Of several processes the first one's devices count, so that all agree; 0 is "not known".
    peak = given * 1e12 if given else world.agree(peak_of(place, dtype) or 0.0)
    return world.size * peak or None


def announce(
    cost: Any, stream: Any, settings: Any, count: int, peak: float | None, flops: float, how: str
) -> dict[str, Any]:
    """Say on stderr how long the run will take and what memory it needs, as one measured step suggests."""
    steps = settings.total_steps or int(3600 * settings.hours / cost.seconds_per_step)
    tokens = steps * settings.tokens_per_step
    speed = settings.tokens_per_step / cost.seconds_per_step
    mfu = f"{speed * flops / peak:.0%} of the {how} {peak / 1e12:.3g} TFLOP/s" if peak else "not known (--peak-tflops)"
    typer.echo(
        f"{human_count(count)} parameters. About {steps:,} steps, {human_count(tokens)} tokens: "
        f"{steps * settings.batch / len(stream):.1f} passes over the data, {tokens / count:.1f} tokens per parameter. "
        f"About {steps * cost.seconds_per_step / 3600:.2f} hours at {speed:,.0f} tokens/s, "
        f"MFU {mfu}, "
        f"{human_bytes(cost.peak_bytes)} of memory.",
        err=True,
    )
    return {"steps": steps, "seconds_per_step": cost.seconds_per_step, "peak_bytes": cost.peak_bytes}


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
        typer.echo(f"{result.skipped} updates were skipped")
    if result.stopped_by:
        typer.echo(f"stopped by {result.stopped_by}; the same command continues the run")
    else:
        typer.echo(f"model: {result.model}")
