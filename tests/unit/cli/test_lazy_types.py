"""The help of a verb does not import pydantic; values are checked as before."""

from __future__ import annotations

import subprocess
import sys

import pytest

RUN = """
import sys
from minitron.cli import main
sys.argv[1:] = {arguments!r}
try:
    main()
except SystemExit as end:
    print("code", end.code, "pydantic" in sys.modules)
"""


@pytest.mark.parametrize(
    ("arguments", "text", "code"),
    [
        (["generate", "--help"], "Continue a text", 0),
        (["generate", "--nothing"], "No such option: --nothing", 2),
        (["generate", "-p", "x", "-n", "y"], "Input should be a valid integer", 2),
        (["generate", "no/such/folder", "-p", "x"], "no/such/folder: no such file or folder", 2),
    ],
)
def test_pydantic_is_imported_when_a_value_is_checked(arguments: list[str], text: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(arguments=arguments)], capture_output=True, text=True, check=True
    )
    assert text in " ".join((done.stdout + done.stderr).split())
    assert f"code {code} " in done.stdout
    assert done.stdout.endswith("False\n") or "-p" in arguments
