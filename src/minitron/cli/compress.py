"""`minitron compress`: a smaller model within a budget, retrained, with a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..locate import locate
from .common import (
    DeviceOption,
    JsonOption,
    human_bytes,
    human_count,
    print_json,
    quiet_libraries,
    say,
    sentence_errors,
)

# Typer reads the annotations at run time, where it wants Optional.
# ruff: noqa: UP045


@sentence_errors
def compress(
    model: Annotated[
        Optional[str], typer.Argument(help="Checkpoint folder; the recipe's, or the bundled model.")
    ] = None,
    out: Annotated[Optional[Path], typer.Argument(help="Run folder; an interrupted run in it is continued.")] = None,
    recipe: Annotated[
        Optional[str],
        typer.Option(help="YAML, recipe.json of a run, or a name: laptop, bundled, ...; options override it."),
    ] = None,
    data: Annotated[Optional[list[str]], typer.Option(help="PATH[:WEIGHT] of text to train on; repeatable.")] = None,
    heldout: Annotated[Optional[list[str]], typer.Option(help="Text that is only measured; repeatable.")] = None,
    heldout_share: Annotated[
        Optional[float], typer.Option(help="Share of the documents of --data to hold out.")
    ] = None,
    field: Annotated[Optional[str], typer.Option(help="Field or column that holds the text.")] = None,
    encoding: Annotated[Optional[str], typer.Option(help="Encoding of text without a byte-order mark.")] = None,
    skip_bad: Annotated[
        Optional[bool], typer.Option("--skip-bad", help="Leave out documents that cannot be read.")
    ] = None,
    params: Annotated[Optional[str], typer.Option(help="Budget: at most so many parameters, as in 4B.")] = None,
    non_embedding_params: Annotated[
        Optional[str], typer.Option(help="Budget: the same without embedding and LM head, as in 2.6B.")
    ] = None,
    memory: Annotated[
        Optional[str], typer.Option(help="Budget: at most so much for weights and cache, as in 6GB.")
    ] = None,
    speed: Annotated[
        Optional[str], typer.Option(help="Budget: decoding at least so fast on this machine, as in 20tok/s.")
    ] = None,
    keep: Annotated[Optional[str], typer.Option(help="The shape itself, as in heads=24,ffn=9216,hidden=3072.")] = None,
    steps: Annotated[Optional[str], typer.Option(help="Several sizes in parameters, large to small: 8B,4B.")] = None,
    tokens: Annotated[Optional[str], typer.Option(help="Length of each distillation in tokens, as in 20M.")] = None,
    hours: Annotated[Optional[float], typer.Option(help="Or in hours.")] = None,
    batch: Annotated[Optional[int], typer.Option(help="Sequences per optimizer step.")] = None,
    sequence: Annotated[Optional[int], typer.Option(help="Tokens per sequence.")] = None,
    lr: Annotated[Optional[float], typer.Option(help="Highest learning rate.")] = None,
    candidates: Annotated[
        Optional[int], typer.Option(help="Shapes that are retrained for a while; 1 for none.")
    ] = None,
    rank_tokens: Annotated[Optional[str], typer.Option(help="Tokens of that retraining, as in 2M.")] = None,
    calibration_blocks: Annotated[Optional[int], typer.Option(help="Sequences that importance is measured on.")] = None,
    seed: Annotated[Optional[int], typer.Option(help="Decides the order of the data.")] = None,
    cache: Annotated[
        Optional[Path], typer.Option(help="Folder for tokenized text; in the run folder by default.")
    ] = None,
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the stages with tokens, FLOPs, memory and hours."),
    device: str = DeviceOption,
    as_json: bool = JsonOption,
) -> None:
    """Prune a checkpoint to a budget, retrain it by the original, and write a report.

    Stages: (teacher correction,) importance, candidates, ranking by short distillation, pruning, distillation,
    evaluation. The same command again continues an interrupted run; the run folder may be moved.

    Examples:

      minitron compress nemotron-4b runs/small --params 2B --data books/ --heldout-share 0.01 --tokens 1B --dry-run

      minitron compress --recipe laptop runs/laptop

      minitron compress --recipe my/recipe.yaml runs/mine --hours 2
    """
    if recipe is not None and out is None and model is not None:
        model, out = None, Path(model)
    if model is not None:
        locate(model)
    if out is None:
        raise ValueError("the run folder is missing: minitron compress MODEL OUT, or --recipe FILE OUT")
    from ..compress.recipe import load_recipe, parse_count, recipe_from

    budgets = {
        "params": params, "non_embedding_params": non_embedding_params, "memory": memory, "speed": speed, "keep": keep
    }  # fmt: skip
    given = {name: value for name, value in budgets.items() if value is not None}
    values: dict[str, Any] = {}
    if given and steps:
        raise ValueError("give a budget or --steps, not both")
    if given:
        values["targets"] = [given]
    if steps:
        values["targets"] = [{"params": size.strip(), "name": size.strip()} for size in steps.split(",")]
    flat = {
        "model": model, "data": data, "heldout": heldout, "heldout_share": heldout_share, "field": field,
        "encoding": encoding, "skip_bad": skip_bad,
    }  # fmt: skip
    values |= {name: value for name, value in flat.items() if value is not None}
    length = {"tokens": None if tokens is None else parse_count(tokens), "hours": hours}
    nested = {
        "train": {**length, "batch": batch, "sequence": sequence, "lr": lr, "seed": seed},
        "ranking": {"most": candidates, "tokens": None if rank_tokens is None else parse_count(rank_tokens)},
        "calibration": {"blocks": calibration_blocks},
    }
    parts = {name: {k: v for k, v in part.items() if v is not None} for name, part in nested.items()}
    parts = {name: part for name, part in parts.items() if part}
    wanted = (
        load_recipe(recipe, values, parts) if recipe is not None else recipe_from({**_defaults(model), **values}, parts)
    )
    _start(wanted, out, cache, device, dry_run, as_json)


def _defaults(model: str | None) -> dict[str, Any]:
    """Of a run without a recipe: the paper's settings where they do not depend on the size of the model."""
    return {"model": model or "bundled", "train": {"lr": 2e-4, "schedule": "cosine", "warmup": 40}}


def _start(recipe: Any, out: Path, cache: Path | None, device: str, dry_run: bool, as_json: bool) -> None:
    quiet_libraries()
    from ..compress.dry import estimate
    from ..compress.run import token_folder
    from ..train.machine import keep_freed_memory

    keep_freed_memory()
    with token_folder(out, cache) as store:
        rows = estimate(recipe, out, cache=store, device=device, say=say if dry_run else lambda _: None)
        if not as_json or dry_run:
            _print_plan(rows, as_json)
        if dry_run:
            if cache is None:
                store.discard()
            return
        _run(recipe, out, store, device, as_json)


def _run(recipe: Any, out: Path, store: Any, device: str, as_json: bool) -> None:
    from ..compress.run import compress as run_compression
    from ..compress.stages import StoppedError

    try:
        made = run_compression(recipe, out, cache=store, device=device, quiet=as_json)
    except StoppedError as stop:
        typer.echo(f"stopped by {stop}; the same command continues the run", err=True)
        raise typer.Exit(130 if str(stop) == "SIGINT" else 143) from None
    if as_json:
        print_json({"models": {k: str(v) for k, v in made.models.items()}, "report": str(made.report)})
        return
    report = json.loads(made.report.with_suffix(".json").read_text(encoding="utf-8"))
    for sentence in report["summary"]:
        typer.echo(sentence)
    for name, folder in made.models.items():
        typer.echo(f"{name}: {folder}")
    typer.echo(f"report: {made.report}")


def _print_plan(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json({"stages": rows})
        return
    typer.echo(f"{'stage':<24}{'tokens':>10}{'FLOPs':>11}{'memory':>11}{'disk':>11}{'hours':>9}", err=True)
    for row in rows:
        typer.echo(
            f"{row['name']:<24}{human_count(row['tokens']):>10}{row['flops']:>11.2e}"
            f"{human_bytes(row['memory_bytes']):>11}{human_bytes(row['disk_bytes']):>11}{row['hours']:>9.2f}",
            err=True,
        )
    typer.echo(
        f"about {sum(row['hours'] for row in rows):.2f} hours at 30% of the speed of matrix products measured here; "
        f"memory without activations",
        err=True,
    )
