"""The command `minitron`: one file per verb.

Only the file of the verb that is called is imported, and heavy imports are inside its functions, so that help and
errors are instant.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from typing import Any

import typer

from ..version import __version__
from .lazy_types import build_types_when_used

# One line each: the list of verbs on a terminal of 80 columns cuts longer ones.
_VERBS = {
    "generate": "Continue a text, printed as it is written.",
    "chat": "Chat with a model.",
    "serve": "Serve models over HTTP, as OpenAI's API.",
    "inspect": "Show a model's shape, parameters and memory.",
    "convert": "Convert between Hugging Face, NeMo and GGUF.",
    "curate": "Make clean training text from raw text.",
    "prune": "Cut a model down to a budget.",
    "train": "Train a model from text.",
    "finetune": "Teach a model conversations or labels.",
    "predict": "Label texts with a classifier.",
    "distill": "Distil a student from a teacher.",
    "teacher-cache": "Store a teacher's outputs on a text.",
    "compress": "Prune, retrain and report, in one command.",
    "bench": "Measure decoding speed on the CPU.",
    "demo": "Write a story with the bundled model.",
    "eval": "Evaluate models on benchmarks or on text.",
    "doctor": "Examine this machine and installation.",
}
_GROUPS = ("guard",)
"""Verbs that have verbs of their own."""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"minitron {__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def _build(verbs: Iterable[str], listed_only: bool = False) -> typer.Typer:
    """The command with some verbs; if `listed_only`, it can list them and not call them, and none is imported."""
    built = typer.Typer(
        name="minitron",
        help="Run, shrink, retrain, evaluate and convert language models of the Nemotron-4 / Minitron family.",
        epilog="`minitron VERB --help` shows a verb's options and examples.",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    built.callback()(_options)
    for verb in verbs:
        if verb in _GROUPS:
            built.add_typer(_function(verb), name=verb)
        else:
            built.command(verb, short_help=_VERBS[verb])(_not_imported if listed_only else _function(verb))
    return built


def _function(verb: str) -> Any:
    name = verb.replace("-", "_")
    module = importlib.import_module(f".{name}", __name__)
    return getattr(module, f"{name}_" if name == "eval" else name)


def _not_imported() -> None:
    raise AssertionError("a verb that was not imported was called")


def __getattr__(name: str) -> Any:
    """`app`, the command with all its verbs."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = _build((*_VERBS, *_GROUPS))
    return found


def main() -> None:
    """Entry point of the console script."""
    build_types_when_used()
    arguments = sys.argv[1:] or ["--help"]
    if arguments[0] in (*_VERBS, *_GROUPS):
        _build([arguments[0]])()
    else:
        lists = arguments[0] in ("-h", "--help", "--version") and "_MINITRON_COMPLETE" not in os.environ
        _build((*_VERBS, *_GROUPS), listed_only=lists)()
