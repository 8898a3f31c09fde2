"""The commands for many machines in the documents are ones that torchrun and `minitron` understand."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from minitron.cli import app

DOCS = Path(__file__).parents[2] / "docs"


def commands() -> list[str]:
    found = []
    for path in sorted(DOCS.glob("*.md")):
        blocks = re.findall(r"^```\n(torchrun .*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        found += [block.replace("\\\n", " ") for block in blocks]
    return found


def test_there_are_some_for_several_machines() -> None:
    assert sum("--nnodes" in command for command in commands()) >= 2


@pytest.mark.parametrize("command", commands())
def test_it_is_understood(command: str) -> None:
    from torch.distributed.run import get_args_parser

    words = shlex.split(command)
    launch = get_args_parser().parse_args(words[1:])
    assert launch.module
    assert launch.training_script == "minitron"
    assert launch.rdzv_backend == "c10d" or launch.nnodes == "1:1"
    group = typer.main.get_command(app)
    verb, *rest = launch.training_script_args
    made = group.commands[verb].make_context(verb, list(rest))  # type: ignore[attr-defined]
    assert made.params["out"] == Path(rest[rest.index("--out") + 1])
