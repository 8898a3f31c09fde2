"""`minitron finetune`: customize a model with conversations or labelled rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..locate import locate
from . import training as options
from .common import MODEL_HELP, print_json, quiet_libraries, say, sentence_errors
from .quiet_option import with_quiet

# Typer reads the annotations at run time, where it wants Optional.
# ruff: noqa: UP045

_WITHOUT = ("heldout", "heldout_share", "field", "cache", "tensor_parallel", "compile")


@sentence_errors
@with_quiet
@options.with_run_options(
    without=_WITHOUT, lr=1e-4, warmup=20, batch=16, sequence=512, schedule="cosine", weight_decay=0.01, eval_every=0,
    save_every=200,
)  # fmt: skip
def finetune(
    run: options.RunOptions,
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    task: Annotated[
        str,
        typer.Option(
            help="chat: conversations; classify: labels of texts; ner: names in texts; qa: answers within texts."
        ),
    ],
    validation: Annotated[Optional[list[str]], typer.Option(help="Rows measured during training; repeatable.")] = None,
    test: Annotated[Optional[list[str]], typer.Option(help="Rows of the report; repeatable.")] = None,
    split: Annotated[
        float, typer.Option(help="Share of --data for each of validation and test where no files are given.")
    ] = 0.1,
    field: Annotated[
        Optional[list[str]], typer.Option(help="TASK_FIELD=NAME, as text=body or label=spam; repeatable.")
    ] = None,
    columns: Annotated[
        Optional[str], typer.Option(help="Names of the columns of CSV files without a first row of names: a,b,c.")
    ] = None,
    labels: Annotated[str, typer.Option(help="classify: one, several (any number of labels) or number.")] = "one",
    balance: Annotated[bool, typer.Option("--balance", help="classify: every class weighs the same.")] = False,
    tag_names: Annotated[
        Optional[str], typer.Option(help="ner: what tags that are numbers stand for: O,B-PER,I-PER,...")
    ] = None,
    attention: Annotated[
        str, typer.Option(help="ner, qa: causal, bidirectional, or bidirectional:N for the last N layers.")
    ] = "causal",
    preference_loss: Annotated[str, typer.Option(help="dpo: sigmoid (DPO) or ipo.")] = "sigmoid",
    beta: Annotated[float, typer.Option(help="dpo: how strongly the model before training holds.")] = 0.1,
    sft_weight: Annotated[float, typer.Option(help="dpo: weight of the likelihood of the chosen replies.")] = 0.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="classify: texts are messages, as a guard of `minitron serve` reads them.")
    ] = False,
    tune: Annotated[str, typer.Option(help="What is trained: full, norms, head (classify) or lora (peft).")] = "full",
    lora_rank: Annotated[int, typer.Option(help="Rank of the adapters of lora.")] = 16,
    epochs: Annotated[Optional[float], typer.Option(help="Passes over the data. Default: 3.")] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Show the first examples and stop.")] = False,
) -> None:
    """Customize a model: teach it conversations, labels of texts, names in texts, answers to questions, or preferences.

    Rows are JSON lines, JSON, CSV, Parquet, Arrow or CoNLL, also compressed. The same command continues an interrupted
    run. The result is the folder `model` in the run folder, with a card; report.json has the scores beside those of
    simple baselines. The first examples are shown before training begins, what is learned between [[ and ]].

    Examples:

      minitron finetune bundled --task chat --data chats.jsonl --out runs/chat

      minitron finetune smollm2 --task classify --data spam.csv --field text=mail --tune lora --out runs/spam

      minitron finetune bundled --task classify --data spam.csv --tune head --chat --lr 0.01 --out runs/guard

      minitron finetune smollm2 --task classify --data ag.csv --columns label,title,text --preview --out runs/ag

      minitron finetune smollm2 --task ner --data wnut.conll --attention bidirectional --out runs/names

      minitron finetune smollm2 --task qa --data squad.json --sequence 384 --out runs/qa

      minitron finetune runs/chat/model --task dpo --data pairs.jsonl --lr 1e-6 --epochs 1 --out runs/dpo
    """
    from ..tune.options import column_names, field_names

    names, header = field_names(field or []), column_names(columns)
    run.check_run([model])
    locate(model)
    given = [name for name in ("steps", "tokens", "hours") if getattr(run, name) is not None]
    if given and epochs is not None:
        raise ValueError(f"give one of --epochs and --{given[0]}, not both")
    if epochs is not None and not 0 < epochs < math.inf:
        raise ValueError(f"--epochs is {epochs}; it must be greater than 0")
    quiet_libraries()
    from ..data.examples import RowFormat
    from ..tune.task import TuneOptions

    rows = RowFormat(names, header, run.encoding, run.skip_bad)
    chosen = TuneOptions(
        task, tuple(run.data), tuple(validation or ()), tuple(test or ()), split, rows,
        labels,  # type: ignore[arg-type]
        balance, tune, lora_rank, column_names(tag_names, "--tag-names"), attention,
        preference_loss,  # type: ignore[arg-type]
        beta, sft_weight, preview, chat,
    )  # fmt: skip
    with options.processes(run.device, 1) as (world, place):
        _run(run, model, chosen, None if given else epochs or 3.0, preview, world, place)


def _run(
    run: options.RunOptions, model: str, chosen: Any, epochs: float | None, preview: bool, world: Any, place: Any
) -> None:
    from ..checkpoint.hf import read_config
    from ..loading import checkpoint_folder
    from ..tokenizer import load_tokenizer
    from ..train.loop import train
    from ..tune.job import prepare_job
    from ..tune.task import Inputs

    quiet: Any = (lambda _: None) if run.as_json or not world.first else say
    folder = world.first_then_all(lambda: checkpoint_folder(model, say))
    config = read_config(folder)
    run.sequence = min(run.sequence, config.max_position_embeddings)
    tokenizer = load_tokenizer(folder, vocab_size=config.vocab_size)
    job = prepare_job(
        Inputs(folder, tokenizer, chosen, run.sequence, run.seed, place, quiet, run.out.parent / "reference-cache")
    )
    if world.first:
        for note in job.notes:
            quiet(f"note: {note}")
        for number, text in enumerate(job.preview, 1):
            quiet(f"--- example {number} ---\n{text}")
    if preview:
        return
    if epochs is not None:
        run.steps = max(1, math.ceil(epochs * len(job.stream) / run.batch))
        run.warmup = min(run.warmup, run.steps // 5)
    settings = run.settings()
    flops = float(6 * sum(p.numel() for p in job.model.parameters()))
    peak, _ = options.prepare(run, (), options.Measured(job.model, job.stream, job.loss, flops), settings, world, place)
    result = train(
        job.model, job.stream, settings, run.out, heldout=job.measures, loss=job.loss, identity=job.identity,
        tokenizer=tokenizer, quiet=run.as_json, world=world, peak_flops=peak, flops_per_token=flops, extend=run.extend,
    )  # fmt: skip
    if result.model is not None:
        _finish(run, model, folder, chosen, job, result, world)
    elif world.first:
        typer.echo(f"stopped by {result.stopped_by}; the same command continues the run", err=run.as_json)


def _finish(run: options.RunOptions, model: str, base: Path, chosen: Any, job: Any, result: Any, world: Any) -> None:
    """Write report and card, and say what came out."""
    from ..files import write_json, write_text
    from ..files.ownership import write_record
    from ..tune.card import card, score_table
    from ..tune.models import store_temperature

    report = {**job.report(job.model), "base": Path(model).name, "validation": result.heldout.get("validation")}
    if not world.first:
        return
    settings = {"tune": chosen.tune, "steps": run.steps, "batch": run.batch, "lr": run.lr, "seed": run.seed}
    store_temperature(result.model, report.get("temperature"))
    if chosen.tune == "lora" and world.size == 1:
        report["merge"] = _check_merge(run, base, job, result.model)
    write_json(run.out / "report.json", report)
    write_text(result.model / "README.md", card(Path(model).name, report, settings))
    write_record(result.model)  # the card and the configuration are this run's too, so that it can be done again
    if run.as_json:
        print_json({**report, "model": str(result.model)})
        return
    typer.echo(score_table(report) or f"validation: {report['validation']}")
    typer.echo(f"model: {result.model}; report: {run.out / 'report.json'}")


def _check_merge(run: options.RunOptions, base: Path, job: Any, merged: Path) -> dict[str, float]:
    """Compare the merged model with the adapted one, and keep the adapters of a language model beside it."""
    from ..tune.merging import ADAPTER_FOLDER, merging_error, save_adapter
    from ..tune.models import head_of

    error, largest = merging_error(job.model, merged, job.stream.batches(0, 1, 1)[0].input_ids)
    say(f"merged: logits differ from those with adapters by at most {error:.2g}; the largest is {largest:.3g}")
    if head_of(merged) is None:
        save_adapter(job.model, run.out / ADAPTER_FOLDER, base)
        say(f"the adapters alone: {run.out / ADAPTER_FOLDER}")
    return {"largest_difference": error, "largest_logit": largest}
