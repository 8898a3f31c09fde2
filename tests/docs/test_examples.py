"""Every example runs, is short, and prints something; those for other programs import what this package has."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

OF_OTHERS = {"curator_stage": "nemo_curator", "datatrove_step": "datatrove"}
"""Stages for the pipelines of other packages, which are not installed beside this one."""
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem not in OF_OTHERS], ids=lambda path: path.stem)
def test_example(path: Path) -> None:
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem in OF_OTHERS], ids=lambda path: path.stem)
def test_what_an_example_imports_of_this_package_exists(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    packages = {
        node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module
    }
    assert OF_OTHERS[path.stem] in packages
    ours = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith("minitron")]
    assert ours
    for node in ours:
        module = importlib.import_module(node.module or "")
        assert all(hasattr(module, name.name) for name in node.names), node.module
