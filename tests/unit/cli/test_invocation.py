"""Hints name the program as the shell would find it."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from minitron.cli.invocation import program


def script(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_on_the_path_it_is_called_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = script(tmp_path / "bin", "minitron")
    monkeypatch.setenv("PATH", str(ours.parent))
    monkeypatch.setattr(sys, "argv", [str(ours), "demo"])
    assert program() == "minitron"
    monkeypatch.setattr(sys, "argv", ["/somewhere/minitron/__main__.py", "demo"])
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(ours.parent))
    assert program() == "minitron"


@pytest.mark.parametrize("another", [False, True])
def test_a_script_that_the_shell_does_not_find_is_called_by_its_path(
    another: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "my env" / "bin", "minitron")
    others = script(tmp_path / "other", "minitron").parent if another else tmp_path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(others))
    monkeypatch.setattr(sys, "argv", ["my env/bin/minitron", "demo"])
    assert program() == "'my env/bin/minitron'"


def test_a_module_is_called_by_the_python_that_runs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = script(tmp_path / "env" / "bin", "python3")
    monkeypatch.setattr(sys, "argv", ["/somewhere/minitron/__main__.py", "demo"])
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(python.parent))
    assert program() == "python3 -m minitron"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert program() == "env/bin/python3 -m minitron"
    monkeypatch.chdir(tmp_path / "env" / "bin")
    assert program() == f"{python} -m minitron"  # the shell does not look for programs in the folder itself
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert program() == f"{python} -m minitron"
