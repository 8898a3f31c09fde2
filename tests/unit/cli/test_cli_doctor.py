"""`minitron doctor` as a process: quick, without tracebacks, with exit codes; and terminals without colour."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import minitron.doctor
from minitron.cli import app
from minitron.doctor import Finding


def test_it_says_what_there_is() -> None:
    done = CliRunner().invoke(app, ["doctor", "--no-measure"])
    assert done.exit_code == 0, done.output
    for word in ("minitron", "transformers 5", "GB free", "caches", "Nothing that is needed is missing."):
        assert word in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_json_is_one_object_with_the_same_findings() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json", "--no-measure"])
    found = json.loads(done.stdout)
    assert found["healthy"] is True
    assert [row["subject"] for row in found["findings"]][:3] == ["installation", "versions", "extras"]
    assert all(set(row) == {"subject", "status", "text", "facts", "advice"} for row in found["findings"])


@pytest.mark.parametrize("as_json", [False, True])
def test_a_problem_is_exit_code_1_with_what_to_do(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Finding("versions", "problem", "numba missing", {}, ("numba is missing: pip install numba",))

    def examine(**options: Any) -> list[Finding]:
        return [problem]

    monkeypatch.setattr(minitron.doctor, "examine", examine)
    done = CliRunner().invoke(app, ["doctor", *(["--json"] if as_json else [])])
    assert done.exit_code == 1
    assert "numba is missing: pip install numba" in done.stdout
    assert as_json or "PROBLEM" in done.stdout


def test_a_strange_environment_shows_no_traceback(tmp_path: Path) -> None:
    """No home, no PATH, a wrong number of threads, a cache that is a file."""
    (tmp_path / "file").touch()
    environment = {
        "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
        "HOME": str(tmp_path / "nowhere"),
        "PATH": "",
        "OMP_NUM_THREADS": "-3",
        "MINITRON_CACHE": str(tmp_path / "file" / "below"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "minitron", "doctor", "--no-measure"],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == 0, done
    assert "cannot be written" in " ".join(done.stdout.split())
    assert "OMP_NUM_THREADS is '-3'" in " ".join(done.stdout.split())


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--nothing"], ["doctor", "--no-measure"]])
def test_terminals_get_no_colour(arguments: list[str]) -> None:
    """Nothing is coloured, with NO_COLOR or without."""
    if os.name != "posix":
        pytest.skip("signals")
    import pty

    for settings in ({}, {"NO_COLOR": "1"}):
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "minitron", *arguments]
        environment = {**os.environ, "TERM": "xterm-256color", **settings}
        with subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment) as process:
            os.close(theirs)
            shown = b""
            while True:
                try:
                    part = os.read(ours, 65536)
                except OSError:  # Linux's answer when the other end is closed
                    break
                if not part:
                    break
                shown += part
        os.close(ours)
        assert process.returncode in (0, 2)
        assert shown
        assert b"\x1b[" not in shown
