"""`minitron curate`: raw text in, clean training shards and a report out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from .common import JsonOption, print_json, say, sentence_errors
from .quiet_option import with_quiet

# Typer reads the annotations at run time, where it wants Optional.
# ruff: noqa: UP045


@sentence_errors
@with_quiet
def curate(
    inputs: Annotated[list[str], typer.Argument(metavar="IN...", help="Text files, folders or patterns.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the result; an interrupted run in it is continued.")
    ],
    recipe: Annotated[
        Optional[str], typer.Option(help="YAML file, or a preset: plain, gopher, c4, fineweb, books or code-light.")
    ] = None,
    field: Annotated[Optional[str], typer.Option(help="Field or column that holds the text.")] = None,
    encoding: Annotated[Optional[str], typer.Option(help="Encoding of text without a byte-order mark.")] = None,
    max_bad: Annotated[Optional[float], typer.Option(help="Share of documents that may be unreadable.")] = None,
    output_format: Annotated[
        Optional[str], typer.Option("--format", help="Of the shards: jsonl.zst, jsonl or parquet.")
    ] = None,
    tokenizer: Annotated[Optional[str], typer.Option(help="Count tokens by the tokenizer of this folder.")] = None,
    shuffle: Annotated[Optional[int], typer.Option(help="Shuffle the documents with this seed.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only print what it would take: time, memory, disk.")] = False,
    workers: Annotated[int, typer.Option(help="Processes; 0 for one per core.")] = 0,
    ray: Annotated[
        Optional[str], typer.Option(help="Run on a Ray cluster: its address, or local. All nodes see the same files.")
    ] = None,
    as_json: bool = JsonOption,
) -> None:
    """Curate text: normalize it, apply quality rules, remove duplicates, write shards and a report.

    The shards are in the folder `shards` of the output, which --data of train, distill and compress takes. The same
    command continues an interrupted run. The shards depend neither on the number of workers nor on the order of the
    inputs.

    Examples:

      minitron curate crawl/*.jsonl.gz -o clean --recipe gopher

      minitron curate books/ -o clean --recipe curate.yaml --workers 2
    """
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise ValueError("pyarrow is missing; install it with: pip install 'minitron[curate]'") from None
    import os

    from ..curate.recipe import load_recipe
    from ..curate.report import table
    from ..curate.run import curate as run
    from ..curate.run import plan as estimate_run

    given: dict[str, Any] = {"field": field, "encoding": encoding, "max_bad": max_bad}
    values = {name: value for name, value in given.items() if value is not None}
    if output_format is not None:
        values["output"] = {"format": output_format}
    if tokenizer is not None:
        values["tokens"] = {"tokenizer": tokenizer}
    if shuffle is not None:
        values["shuffle"] = {"seed": shuffle}
    if workers < 0:
        raise ValueError(f"workers is {workers}; it must be at least 0")
    chosen, processes = load_recipe(recipe, values), workers or os.cpu_count() or 1
    if plan:
        expected = estimate_run(inputs, chosen, processes)
        if as_json:
            print_json(expected.as_dict())
        else:
            typer.echo(expected.sentence())
        return
    each = None
    if ray is not None:
        from ..curate.ray_calls import on_ray

        each = on_ray(ray, processes)
    made = run(inputs, out, chosen, workers=processes, say=say, each=each)
    if as_json:
        print_json(made.as_dict())
        return
    typer.echo(table(made.as_dict()))
    if made.bad:
        typer.echo(f"note: {made.bad:,} documents could not be read and were skipped: {made.bad_named[0]}", err=True)
    typer.echo(f"shards: {out / 'shards'}; report: {out / 'report.html'}")
