"""`minitron teacher-cache`: store a teacher's outputs, to distil without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..files import require_space, written_bytes
from ..locate import locate
from . import training as options
from .common import (
    MODEL_HELP,
    DeviceOption,
    DtypeOption,
    JsonOption,
    human_bytes,
    print_json,
    quiet_libraries,
    say,
    sentence_errors,
)
from .quiet_option import with_quiet

# Typer reads the annotations at run time, where it wants Optional.
# ruff: noqa: UP045


@sentence_errors
@with_quiet
def teacher_cache(
    teacher: Annotated[str, typer.Argument(help=MODEL_HELP)],
    data: Annotated[list[str], options.DataOption],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the cache; an interrupted one is continued.")],
    kind: str = typer.Option("hidden", help="hidden (exact, large), sampled (unbiased, small) or topk (biased)."),
    samples: int = typer.Option(50, help="sampled: tokens drawn at each position, 1 to 63."),
    k: int = typer.Option(8, help="topk: most likely tokens kept at each position."),
    blocks: Optional[int] = typer.Option(
        None, help="Blocks from the start of the run (steps x batch); all by default."
    ),
    heldout_share: Annotated[float, options.HeldoutShareOption] = 0.0,
    field: Annotated[str, options.FieldOption] = "text",
    encoding: Annotated[str, options.EncodingOption] = "utf-8",
    skip_bad: Annotated[bool, options.SkipBadOption] = False,
    cache: Annotated[Optional[Path], options.CacheOption] = None,
    sequence: Annotated[int, options.SequenceOption] = 512,
    seed: Annotated[int, options.SeedOption] = 0,
    dtype: str = DtypeOption,
    device: str = DeviceOption,
    as_json: bool = JsonOption,
) -> None:
    """Store a teacher's outputs on the training text in a folder.

    Data, held-out share, sequence and seed must be those of the distillation; the cache refuses others.

    \b
    Examples:
      minitron teacher-cache teacher --data corpus/ --out targets
      minitron teacher-cache 15b --data web.jsonl --kind sampled --blocks 460800 --sequence 4096 --out targets
    """
    options.check_run(out, [teacher], data, cache)
    locate(teacher)
    quiet_libraries()
    from ..checkpoint.fingerprint import fingerprint
    from ..checkpoint.hf import check_checkpoint
    from ..data.token_cache import TokenFolder
    from ..distill.teacher_cache import make_codec, measure_bytes, plan_cache, write_cache
    from ..loading import checkpoint_folder, load
    from ..tokenizer import load_tokenizer
    from ..train.inputs import open_texts
    from ..train.schedule import TrainConfig

    folder = checkpoint_folder(teacher, say)
    check_checkpoint(folder)
    tokens: Any = load_tokenizer(folder)
    settings = TrainConfig(steps=1, sequence=sequence, seed=seed)
    with TokenFolder(cache or out.parent / "token-cache") as store:
        texts = open_texts(data, [], heldout_share, tokens, settings, store, field, encoding, skip_bad)
        options.tell(texts.notes)
        model = load(folder, dtype=dtype, device=device).model
        codec = make_codec(kind, model, samples=samples, k=k)
        plan = plan_cache(texts.stream, model, codec, fingerprint(folder), blocks=blocks, seed=seed)
        size = measure_bytes(plan, texts.stream, model)
        count = len(plan.indices) * sequence
        typer.echo(
            f"{len(plan.indices):,} blocks of {sequence} tokens: about {human_bytes(size)}, "
            f"{size / count:.1f} bytes per token",
            err=True,
        )
        require_space(out, size - (written_bytes(out) if out.is_dir() else 0))
        write_cache(out, plan, texts.stream, model, _progress, accepted=store.keep)
    written = written_bytes(out)
    if as_json:
        print_json({"cache": str(out), "kind": kind, "blocks": len(plan.indices), "tokens": count, "bytes": written})
    else:
        typer.echo(f"{out}: {len(plan.indices):,} blocks, {human_bytes(written)}")


def _progress(done: int, of: int) -> None:
    typer.echo(f"\r{done} of {of} files", nl=done == of, err=True)
