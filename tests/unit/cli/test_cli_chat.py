"""`minitron chat` at the terminal: commands, a context that is full, templates that do not end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from text_checkpoint import make_text_checkpoint
from typer.testing import CliRunner, Result

from minitron.cli import app

runner = CliRunner()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, a context of 64 tokens."""
    return make_text_checkpoint(tmp_path_factory.mktemp("chat") / "model")


def chat(model: Path, *lines: str, system: str = "") -> Result:
    options = ["--seed", "1", "-n", "3", *(["--system", system] if system else [])]
    return runner.invoke(app, ["chat", str(model), *options], input="".join(f"{line}\n" for line in lines))


def test_help_is_answered_by_the_program(model: Path) -> None:
    for word in ("/help", "/HELP", "/help me"):
        done = chat(model, word, "/quit")
        assert done.exit_code == 0
        assert "/reset" in done.stdout
        assert "/quit" in done.stdout


@pytest.mark.parametrize("end", ["/quit", "/exit", "/Quit"])
def test_ways_to_end(model: Path, end: str) -> None:
    done = chat(model, end, "/help")
    assert done.exit_code == 0
    assert "/reset" not in done.stdout


def test_unknown_commands_do_not_go_to_the_model(model: Path) -> None:
    done = chat(model, "/halp", "/")
    assert done.stderr.count("no such command; /help lists them") == 2
    assert done.stdout == ""


def test_paths_and_doubled_strokes_are_messages(model: Path) -> None:
    done = chat(model, "/etc/hosts is a file", "//help")
    assert done.exit_code == 0
    assert "no such command" not in done.stderr
    assert len(done.stdout.splitlines()) >= 2


def test_the_oldest_turns_are_dropped_and_it_is_said(model: Path) -> None:
    done = chat(model, *["hello little cat and old dog"] * 8, system="hello")
    assert done.exit_code == 0, done.stderr
    assert "(the context of 64 tokens is full: the oldest turn was dropped)" in done.stderr


def test_a_message_that_is_too_long_is_left_out(model: Path) -> None:
    done = chat(model, "hello", "the cat " * 200, "hello")
    assert done.exit_code == 0, done.stderr
    assert "the message is too long" in done.stderr
    assert "the model's context is 64; it was skipped" in done.stderr
    assert "dropped" not in done.stderr


def test_a_template_that_does_not_end(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hostile"
    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(loops)
    done = chat(folder, "hello")
    assert done.exit_code == 2
    assert "the chat template took more than" in done.stderr
    assert json.loads((folder / "config.json").read_text())["model_type"] == "nemotron"


def test_a_line_that_is_not_utf8_is_left_out_and_the_conversation_goes_on(model: Path) -> None:
    text = b"hello caf\xe9\nhello\n/quit\n"
    done = runner.invoke(app, ["chat", str(model), "--seed", "1", "-n", "3"], input=text)
    assert done.exit_code == 0, done.stderr
    assert "the message is not UTF-8 text: the byte 0xe9 at character 10" in done.stderr
    assert done.stderr.count("was skipped") == 1
    assert len(done.stdout.splitlines()) >= 1
