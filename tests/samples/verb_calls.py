"""Verbs called in this process, as a shell calls them."""

from __future__ import annotations

import typer
from typer.testing import CliRunner


def call(verb: object, *arguments: object) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of a verb's function with arguments."""
    app = typer.Typer()
    app.command()(verb)  # type: ignore[arg-type]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr
