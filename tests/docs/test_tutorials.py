"""The tutorials: their programs run, one page after the other, and print what stands below them."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def load() -> Any:
    spec = importlib.util.spec_from_file_location("tutorials", ROOT / "scripts" / "tutorials.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = load()
PAGES = sorted(SCRIPT.FOLDER.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_tutorial_prints_what_it_says(page: Path) -> None:
    before = page.read_text(encoding="utf-8")
    assert SCRIPT.same_output(before, SCRIPT.run(before)), f"run python scripts/tutorials.py {page.stem}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_program_of_a_tutorial_has_an_output(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.count("```python") == len(SCRIPT._BLOCK.findall(text)) > 0
    assert all(output.strip() for _, output in SCRIPT._BLOCK.findall(text))


def test_other_outputs_are_noticed() -> None:
    page = "```python\nprint('3 layers', 0.5)\n```\n\n```text\n3 layers 0.5\n```"
    assert SCRIPT.run(page) == page
    for other, same in (
        ("3 layers 0.51", True),
        ("3 layers 0.7", False),
        ("4 layers 0.5", False),
        ("3 layer 0.5", False),
    ):
        assert SCRIPT.same_output(page, page.replace("3 layers 0.5\n", f"{other}\n")) is same
