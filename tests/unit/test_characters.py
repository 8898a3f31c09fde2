"""What is no character is a sentence, before a tokenizer sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitron.characters import require_characters
from minitron.text_stream import encode_prompt


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"caf\xe9".decode("utf-8", "surrogateescape"), "the prompt is not UTF-8 text: the byte 0xe9 at character 4"),
        ("ab\ud800", r"the prompt is not UTF-8 text: the lone surrogate \\ud800 at character 3"),
        ("\udfff", r"the lone surrogate \\udfff at character 1"),
    ],
)
def test_lone_surrogates_are_named(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        require_characters(text, "the prompt")
    with pytest.raises(ValueError, match=says):
        encode_prompt(None, text)  # type: ignore[arg-type]


def test_text_passes() -> None:
    for text in ("", "plain", "na\u00efve \U0001f600 \x00 \ufeff"):
        assert require_characters(text, "text") is text


def run(*arguments: bytes, text: bytes = b"", locale: str = "C.UTF-8") -> tuple[int, str]:
    command = [sys.executable.encode(), b"-m", b"minitron", *arguments]
    done = subprocess.run(
        command, input=text, capture_output=True, timeout=240, env={**os.environ, "LC_ALL": locale}, check=False
    )
    return done.returncode, done.stderr.decode()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([b"generate", b"-p", b"caf\xe9"], "--prompt is not UTF-8 text: the byte 0xe9 at character 4"),
        ([b"chat", b"--system", b"\xff"], "--system is not UTF-8 text: the byte 0xff at character 1"),
        ([b"generate", b"-p", b"x", b"--stop", b"\xc3"], "--stop is not UTF-8 text: the byte 0xc3"),
        ([b"train", b"--data", b"\xff.txt", b"--out", b"o", b"--model", b"bundled", b"--steps", b"1"], "--data is not"),
        ([b"eval", b"--suite", b"quick", b"--data", b"\xff.txt"], "--data is not UTF-8 text"),
    ],
)
def test_a_command_line_that_is_not_utf8_is_one_sentence(arguments: list[bytes], says: str) -> None:
    code, errors = run(*arguments)
    assert code == 2
    assert says in errors
    assert len(errors.strip().splitlines()) == 1


def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9.json"
    Path(os.fsdecode(name)).write_text("{")
    code, errors = run(b"inspect", name)
    assert code == 2
    assert "is not UTF-8" not in errors


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_the_standard_input_too(locale: str) -> None:
    code, errors = run(b"generate", b"-p", b"-", text=b"caf\xe9 au lait", locale=locale)
    assert code == 2
    assert "byte 0xe9" in errors
    assert len(errors.strip().splitlines()) == 1
