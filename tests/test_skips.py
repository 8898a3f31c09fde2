"""A skip hides what it skips: only those with a listed reason pass."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def outcome(tmp_path: Path, source: str) -> str:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path / "conftest.py")
    (tmp_path / "test_one.py").write_text(f"import pytest\n{source}\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("def test(): pytest.skip('needs a CUDA device')", "1 skipped"),
        ("def test(): pytest.skip('not today')", "1 failed"),
        ("def test(): pytest.importorskip('minitron.no_such_module')", "1 failed"),
        ("pytest.importorskip('minitron.no_such_module')\ndef test(): pass", "1 error"),
        ("@pytest.mark.skipif(True, reason='renamed')\ndef test(): pass", "1 error"),
        ("@pytest.mark.xfail\ndef test(): assert False", "1 xfailed"),
    ],
)
def test_a_skip_without_a_listed_reason_fails(source: str, word: str, tmp_path: Path) -> None:
    assert word in outcome(tmp_path, source)
