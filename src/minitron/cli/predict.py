"""`minitron predict`: labels, names or answers for rows, by a model with a trained head."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Optional

import typer

from ..locate import locate
from .common import (
    MODEL_HELP,
    DeviceOption,
    DtypeOption,
    JsonOption,
    check_output,
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
def predict(
    model: Annotated[str, typer.Argument(help=MODEL_HELP)],
    file: Annotated[str, typer.Argument(metavar="FILE", help="Rows: JSON lines, CSV, Parquet, CoNLL, ...")],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON lines with the predictions.")] = Path(
        "predictions.jsonl"
    ),
    field: Annotated[
        Optional[list[str]], typer.Option(help="FIELD=NAME, as text=body or question=query; repeatable.")
    ] = None,
    columns: Annotated[
        Optional[str], typer.Option(help="Names of the columns of CSV files without a first row of names: a,b,c.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Encoding of text without a byte-order mark.")] = "utf-8",
    batch: Annotated[
        int, typer.Option(help="Rows per forward pass, at most; on a CPU long rows share one with fewer.")
    ] = 32,
    sequence: Annotated[
        Optional[int], typer.Option(help="Tokens that are read at once; the model's positions by default.")
    ] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Labels: probabilities at the temperature that finetune stored.")
    ] = False,
    dtype: str = DtypeOption,
    device: str = DeviceOption,
    as_json: bool = JsonOption,
) -> None:
    """Label texts, find names in them, or answer questions about them, with a model that finetune made.

    Each line of the output belongs to the row of the same number: the label and the probability of every label; the
    names with their places; or the answer and its place. The same command continues an interrupted one.

    Examples:

      minitron predict runs/spam/model mails.csv --field text=mail --out labels.jsonl

      minitron predict runs/names/model posts.jsonl --out names.jsonl

      minitron predict runs/qa/model questions.json --out answers.jsonl
    """
    from ..tune.options import column_names, field_names

    names, header = field_names(field or []), column_names(columns)
    if batch < 1:
        raise ValueError(f"--batch is {batch}; it must be at least 1")
    if sequence is not None and sequence < 1:
        raise ValueError(f"--sequence is {sequence}; it must be at least 1")
    locate(model)
    check_output(out, (".jsonl",), [file])
    quiet_libraries()
    from ..data.examples import RowFormat
    from ..loading import checkpoint_folder, pick_device
    from ..tokenizer import load_tokenizer
    from ..tune.predict import open_predictor, read_unlabelled, write_predictions

    folder = checkpoint_folder(model, say)
    found = open_predictor(folder, load_tokenizer(folder), dtype, pick_device(device), sequence, calibrated)
    items = read_unlabelled(file, found, RowFormat(names, header, encoding))
    digest = hashlib.sha256(
        repr((items, found.sequence, dtype, device, *([calibrated] if calibrated else []))).encode()
    )
    for weights in sorted(folder.glob("*.safetensors")):
        state = weights.stat()
        digest.update(f"{weights.resolve()} {state.st_size} {state.st_mtime_ns}".encode())
    done = write_predictions(
        found, items, out, digest.hexdigest(), batch, lambda n: say(f"{n:,} of {len(items):,} rows")
    )
    if as_json:
        print_json({"rows": len(items), "already_done": done, "out": str(out)})
    else:
        typer.echo(f"{len(items):,} rows: {out}" + (f" ({done:,} were already done)" if done else ""))
