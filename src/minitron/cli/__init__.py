"""The command `minitron`: one file per verb. Heavy imports are inside the functions, so that --help is instant."""

from __future__ import annotations

import typer

from ..version import __version__
from .bench import bench
from .chat import chat
from .compress import compress
from .convert import convert
from .curate import curate
from .demo import demo
from .distill import distill
from .eval import eval_
from .finetune import finetune
from .generate import generate
from .guard import guard
from .inspect import inspect
from .predict import predict
from .prune import prune
from .serve import serve
from .teacher_cache import teacher_cache
from .train import train

app = typer.Typer(
    name="minitron",
    help="Run, shrink, retrain, evaluate and convert language models of the Nemotron-4 / Minitron family.",
    epilog="`minitron VERB --help` shows a verb's options and examples.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# One line each: the list of verbs on a terminal of 80 columns cuts longer ones.
_VERBS = (
    (generate, "Continue a text, printed as it is written."),
    (chat, "Chat with a model."),
    (serve, "Serve models over HTTP, as OpenAI's API."),
    (inspect, "Show a model's shape, parameters and memory."),
    (convert, "Convert between Hugging Face, NeMo and GGUF."),
    (curate, "Make clean training text from raw text."),
    (prune, "Cut a model down to a budget."),
    (train, "Train a model from text."),
    (finetune, "Teach a model conversations or labels."),
    (predict, "Label texts with a classifier."),
    (distill, "Distil a student from a teacher."),
    (teacher_cache, "Store a teacher's outputs on a text."),
    (compress, "Prune, retrain and report, in one command."),
    (bench, "Measure decoding speed on the CPU."),
    (demo, "Write a story with the bundled model."),
    (eval_, "Evaluate models on benchmarks or on text."),
)
for _verb, _summary in _VERBS:
    app.command(_verb.__name__.strip("_").replace("_", "-"), short_help=_summary)(_verb)
app.add_typer(guard, name="guard")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"minitron {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_show_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def main() -> None:
    """Entry point of the console script."""
    app()
