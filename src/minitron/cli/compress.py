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
from .quiet_option import with_quiet
from .training import processes

# Typer reads the annotations at run time, where it wants Optional.
# ruff: noqa: UP045


@sentence_errors
@with_quiet
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
    field: Annotated[
        Optional[str], typer.Option(help="Field or column that holds the text; rows: FIELD=NAME,...")
    ] = None,
    encoding: Annotated[Optional[str], typer.Option(help="Encoding of text without a byte-order mark.")] = None,
    skip_bad: Annotated[Optional[bool], typer.Option("--skip-bad", help="Skip documents that cannot be read.")] = None,
    params: Annotated[Optional[str], typer.Option(help="Budget: most parameters, as in 4B.")] = None,
    non_embedding_params: Annotated[
        Optional[str], typer.Option(help="Budget: most parameters without embedding and LM head, as in 2.6B.")
    ] = None,
    memory: Annotated[Optional[str], typer.Option(help="Budget: most memory of weights and cache, as in 6GB.")] = None,
    speed: Annotated[
        Optional[str], typer.Option(help="Budget: least decoding speed on this machine, as in 20tok/s.")
    ] = None,
    keep: Annotated[Optional[str], typer.Option(help="The shape itself, as in heads=24,ffn=9216,hidden=3072.")] = None,
    sizes: Annotated[Optional[str], typer.Option(help="Several sizes in parameters, large to small: 8B,4B.")] = None,
    steps: Annotated[Optional[str], typer.Option(hidden=True, help="Former name of --sizes.")] = None,
    tokens: Annotated[Optional[str], typer.Option(help="Length of each distillation in tokens, as in 20M.")] = None,
    hours: Annotated[Optional[float], typer.Option(help="Length of each distillation in hours.")] = None,
    batch: Annotated[Optional[int], typer.Option(help="Sequences per optimizer step.")] = None,
    sequence: Annotated[Optional[int], typer.Option(help="Tokens per sequence.")] = None,
    lr: Annotated[Optional[float], typer.Option(help="Highest learning rate.")] = None,
    candidates: Annotated[
        Optional[int], typer.Option(help="Shapes that are retrained before one is chosen; 1 for no such ranking.")
    ] = None,
    rank_tokens: Annotated[Optional[str], typer.Option(help="Tokens of that retraining, as in 2M.")] = None,
    calibration_blocks: Annotated[Optional[int], typer.Option(help="Sequences that importance is measured on.")] = None,
    seed: Annotated[Optional[int], typer.Option(help="Seed of the order of the data.")] = None,
    cache: Annotated[
        Optional[Path], typer.Option(help="Folder for tokenized text; in the run folder by default.")
    ] = None,
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the stages with tokens, FLOPs, memory and hours."),
    device: str = DeviceOption,
    as_json: bool = JsonOption,
) -> None:
    """Prune a checkpoint to a budget, retrain it by the original, and write a report.

    A sequence classifier is compressed with labelled rows of its task (--data; --field text=mail,label=kind):
    the task's loss chooses the shape, and the labels' logits are distilled. Its budget may be a share such as 50%.

    Stages: (teacher correction,) importance, candidates, ranking by short distillation, pruning, distillation,
    evaluation. The same command again continues an interrupted run; the run folder may be moved. Under torchrun the
    processes share the work: what trains is sharded over them.

    Examples:

      minitron compress nemotron-4b runs/small --params 2B --data books/ --heldout-share 0.01 --tokens 1B --dry-run

      minitron compress --recipe laptop runs/laptop

      minitron compress runs/spam/model runs/half --params 50% --data mails.csv

      minitron compress --recipe my/recipe.yaml runs/mine --hours 2

      torchrun --nproc-per-node 8 -m minitron compress --recipe my/recipe.yaml runs/mine --sizes 8B,4B
    """
    if recipe is not None and out is None and model is not None:
        model, out = None, Path(model)
    if out is None:
        raise ValueError("the run folder is missing: minitron compress MODEL OUT, or --recipe FILE OUT")
    options = locals()
    if model is not None:
        head = _head_in(locate(model))  # a wrong name is refused before torch is imported
        if head is not None:
            _compress_classifier(options, head)
            return
    with processes(device, tensor_parallel=1, patience_hours=24) as (world, _):
        wanted = world.first_does(lambda: _recipe_of(options))
        _start(wanted, out, cache, device, dry_run, as_json, world)


def _head_in(place: Any) -> str | None:
    """The class of a checkpoint that is no language model; None for one, and for what is not here."""
    try:
        classes = json.loads((place / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    except (OSError, ValueError, TypeError, AttributeError):
        return None  # a repository or another format; what is wrong with a file is said when it is opened
    return str(classes[0]) if str(classes[0]).endswith(("Classification", "QuestionAnswering")) else None


_NOT_FOR_CLASSIFIERS = ("recipe", "speed", "sizes", "steps", "rank_tokens", "cache")


def _compress_classifier(options: dict[str, Any], head: str) -> None:
    """Compress a sequence classifier with its task's rows."""
    model, out = options["model"], options["out"]
    if not head.endswith("ForSequenceClassification"):
        raise ValueError(
            f"{model} is a {head}; compress works on language models and sequence classifiers. Cut it with `minitron "
            f"prune {model} SMALLER --keep SHAPE` and train SMALLER with `minitron finetune`, which keeps its head"
        )
    unfit = next((name for name in _NOT_FOR_CLASSIFIERS if options[name] is not None), None)
    if unfit is not None:
        raise ValueError(f"--{unfit.replace('_', '-')} is not for sequence classifiers, and {model} is one")
    budgets = _targets(options)
    if len(budgets) != 1 or len(budgets[0]) != 1:
        raise ValueError("give one budget: --params (4M or 50%), --non-embedding-params, --memory or --keep")
    if not options["data"]:
        raise ValueError(f"--data is missing: labelled rows of the task of {model}")
    quiet_libraries()
    from ..compress.classifier import ClassifierRecipe, compress_classifier
    from ..compress.recipe import parse_count
    from ..compress.stages import StoppedError
    from ..data.examples import RowFormat
    from ..loading import pick_device
    from ..tune.card import score_table
    from ..tune.options import field_names

    names = field_names(options["field"].split(",") if options["field"] else [])
    given = {name: options[name] for name in ("hours", "batch", "sequence", "lr", "seed")}
    given["tokens"] = None if options["tokens"] is None else parse_count(options["tokens"])
    chosen = {"share": options["heldout_share"], "candidates": options["candidates"],
              "calibration_rows": options["calibration_blocks"]}  # fmt: skip
    recipe = ClassifierRecipe(
        Path(model), tuple(options["data"]), next(iter(budgets[0].items())), tuple(options["heldout"] or ()),
        rows=RowFormat(names, (), options["encoding"] or "utf-8", bool(options["skip_bad"])),
        train={name: value for name, value in given.items() if value is not None},
        **{name: value for name, value in chosen.items() if value is not None},
    )  # fmt: skip
    as_json = options["as_json"]
    try:
        made = compress_classifier(
            recipe, out, device=pick_device(options["device"]), quiet=as_json, dry=options["dry_run"], say=say
        )
    except StoppedError as stop:
        say(f"stopped by {stop}; the same command continues the run")
        raise typer.Exit(130 if str(stop) == "SIGINT" else 143) from None
    if made is None:
        return
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    if as_json:
        print_json({**report, "model": str(made)})
        return
    typer.echo(score_table(report))
    typer.echo(f"model: {made}; report: {out / 'report.json'}")


_BUDGETS = ("params", "non_embedding_params", "memory", "speed", "keep")
_FIELDS = ("model", "data", "heldout", "heldout_share", "field", "encoding", "skip_bad")


def _recipe_of(options: dict[str, Any]) -> Any:
    """The recipe that options ask for, by their names; those that were not given are None."""
    from ..compress.recipe import load_recipe, parse_count, recipe_from

    recipe = options["recipe"]
    values = {name: options[name] for name in _FIELDS if options[name] is not None}
    targets = _targets(options)
    if targets:
        values["targets"] = targets
    counts = {name: None if options[name] is None else parse_count(options[name]) for name in ("tokens", "rank_tokens")}
    nested = {
        "train": {"tokens": counts["tokens"], **{n: options[n] for n in ("hours", "batch", "sequence", "lr", "seed")}},
        "ranking": {"most": options["candidates"], "tokens": counts["rank_tokens"]},
        "calibration": {"blocks": options["calibration_blocks"]},
    }
    parts = {name: {k: v for k, v in part.items() if v is not None} for name, part in nested.items()}
    parts = {name: part for name, part in parts.items() if part}
    if recipe is not None:
        return load_recipe(recipe, values, parts)
    # The paper's settings where they do not depend on the size of the model.
    defaults = {"model": "bundled", "train": {"lr": 2e-4, "schedule": "cosine", "warmup": 40}}
    return recipe_from({**defaults, **values}, parts)


def _targets(options: dict[str, Any]) -> list[dict[str, Any]]:
    """What options say about the sizes; empty if nothing."""
    budget = {name: options[name] for name in _BUDGETS if options[name] is not None}
    sizes, former = options["sizes"], options["steps"]
    if former is not None:
        say("note: --steps is deprecated, use --sizes: the steps of other commands are optimizer steps")
        if sizes is not None:
            raise ValueError("--sizes and --steps, its former name, are both given; give --sizes")
        sizes = former
    if budget and sizes is not None:
        raise ValueError("give a budget or --sizes, not both")
    if sizes is not None:
        return [{"params": size.strip(), "name": size.strip()} for size in sizes.split(",")]
    return [budget] if budget else []


def _start(recipe: Any, out: Path, cache: Path | None, device: str, dry_run: bool, as_json: bool, world: Any) -> None:
    quiet_libraries()
    from ..compress.context import token_folder
    from ..compress.dry import estimate

    with token_folder(out, cache) as store:
        tell = say if dry_run else lambda _: None
        rows = estimate(recipe, out, cache=store, device=device, say=tell, world=world)
        if world.first and (dry_run or not as_json):
            _print_plan(rows, as_json)
        if not dry_run:
            _run(recipe, out, store, device, as_json, world)
        elif cache is None:
            store.discard()


def _run(recipe: Any, out: Path, store: Any, device: str, as_json: bool, world: Any) -> None:
    from ..compress.run import compress as run_compression
    from ..compress.stages import StoppedError

    try:
        made = run_compression(recipe, out, cache=store, device=device, quiet=as_json, world=world)
    except StoppedError as stop:
        if world.first:
            say(f"stopped by {stop}; the same command continues the run")
        raise typer.Exit(130 if str(stop) == "SIGINT" else 143) from None
    if world.first:
        _print_result(made, as_json)


def _print_result(made: Any, as_json: bool) -> None:
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
