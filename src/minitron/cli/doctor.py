"""`minitron doctor`: what this machine and this installation have, and what to do about what is missing."""

from __future__ import annotations

import textwrap

import typer

from .common import JsonOption, no_gpu, print_json, sentence_errors

_MARKS = {"ok": "ok", "note": "note", "problem": "PROBLEM", "unknown": "?"}
_WIDTH = 100


@sentence_errors
def doctor(
    measure: bool = typer.Option(True, help="Measure the memory's bandwidth (half a second)."),
    as_json: bool = JsonOption,
) -> None:
    """Examine this machine and this installation, and say what to do about what is missing.

    Shown are versions beside the tested ones, extras, vector instructions, cores, memory and its bandwidth, GPUs, and
    caches. torch is not imported. The exit code is 1 if something that is needed is missing.

    Examples:

      minitron doctor

      minitron doctor --json
    """
    from ..doctor import examine

    found = examine(gpu_driver=not no_gpu(), measure=measure)
    problems = [finding for finding in found if finding.status == "problem"]
    if as_json:
        print_json({"healthy": not problems, "findings": [finding.as_dict() for finding in found]})
    else:
        for finding in found:
            _print(f"{_MARKS[finding.status]:8}{finding.subject:13} ", finding.text)
            for sentence in finding.advice:
                _print(" " * 22 + "> ", sentence)
        typer.echo("Something that is needed is missing." if problems else "Nothing that is needed is missing.")
    if problems:
        raise typer.Exit(1)


def _print(head: str, text: str) -> None:
    """A paragraph whose later lines stand below the first word of `text`."""
    lines = textwrap.wrap(text, _WIDTH - len(head), break_long_words=False, break_on_hyphens=False) or [""]
    typer.echo("\n".join([head + lines[0], *(" " * len(head) + line for line in lines[1:])]))
