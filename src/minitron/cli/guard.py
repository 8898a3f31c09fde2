"""`minitron guard init`: a NeMo Guardrails configuration in front of `minitron serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from .common import JsonOption, print_json, sentence_errors

# Typer reads the annotations at run time, where it wants Optional.
# ruff: noqa: UP045

guard = typer.Typer(
    help="Put rails in front of a served model, with NeMo Guardrails.", no_args_is_help=True, rich_markup_mode=None
)


@guard.callback()
def _group() -> None:
    pass


@guard.command(short_help="Write a configuration for NeMo Guardrails.")
@sentence_errors
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder for the configuration.")],
    server: Annotated[str, typer.Option(help="Address of `minitron serve`.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="The served model that answers.")] = "bundled",
    classifier: Annotated[
        Optional[str], typer.Option(help="A served classification head that reads all texts.")
    ] = None,
    block: Annotated[
        Optional[list[str]], typer.Option(help="A label of the classifier that blocks; repeatable.")
    ] = None,
    threshold: Annotated[float, typer.Option(help="Probability from which on a label blocks.")] = 0.5,
    dialog: Annotated[bool, typer.Option(help="Answer messages near an example with a written text.")] = True,
    embeddings: Annotated[Optional[str], typer.Option(help="The served model that compares messages.")] = None,
    similarity: Annotated[float, typer.Option(help="Least cosine similarity to an example.")] = 0.75,
    self_check: Annotated[bool, typer.Option(help="Ask the model itself about each text.")] = False,
    api_key_env: Annotated[Optional[str], typer.Option(help="Environment variable with the server's API key.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a configuration that was not edited.")] = False,
    as_json: bool = JsonOption,
) -> None:
    """Write a configuration of NeMo Guardrails that works offline against `minitron serve`.

    It checks messages and answers by patterns, by a classification head if you name one, and by the model itself if
    you ask for it. Each line of config.yml is explained there. Telemetry is off in run.py.

    Examples:

      minitron guard init rails

      minitron guard init rails --model smollm2 --classifier spam --block spam --threshold 0.9
    """
    from ..serve.guardrails import GuardOptions, write_guardrails

    options = GuardOptions(
        server,
        model,
        classifier,
        tuple(block or ()),
        threshold,
        dialog,
        embeddings,
        similarity,
        self_check,
        api_key_env,
    )
    files = write_guardrails(folder, options, overwrite)
    if as_json:
        print_json({"folder": str(folder), "files": [str(file) for file in files]})
        return
    typer.echo(f"wrote {', '.join(file.name for file in files)} to {folder}")
    packages = "nemoguardrails==0.24.1 openai" if dialog else "nemoguardrails==0.24.1"
    typer.echo(f'try it: python {folder / "run.py"} "Hello"  (needs: pip install {packages})')
