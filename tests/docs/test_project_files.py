"""Versions, citation, deprecations, workflows and templates: what a release is checked for without building it."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import minitron

ROOT = Path(__file__).parents[2]
WORKFLOWS = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".gitlab-ci.yml"]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def number(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def test_the_version_is_the_same_everywhere() -> None:
    newest = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", read("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == minitron.__version__ == yaml.safe_load(read("CITATION.cff"))["version"]
    assert f"minitron {minitron.__version__}, Python" in read("docs/terminal.md")


def test_the_citation_has_what_its_format_requires() -> None:
    """Keys and types of the Citation File Format 1.2.0; `make release` also runs its validator."""
    found = yaml.safe_load(read("CITATION.cff"))
    assert set(found) >= {"cff-version", "message", "title", "authors"}
    assert found["cff-version"] == "1.2.0"
    assert found["type"] == "software"
    assert isinstance(found["version"], str)
    for reference in found["references"]:
        assert set(reference) >= {"type", "title", "authors"}
        assert all("family-names" in author or "name" in author for author in reference["authors"])


def deprecations() -> list[list[str]]:
    rows = [line.strip("| \n").split(" | ") for line in read("docs/deprecations.md").splitlines() if line[:1] == "|"]
    return rows[2:]


@pytest.mark.parametrize("row", deprecations(), ids=lambda row: row[0])
def test_a_deprecated_name_still_works_for_one_release(row: list[str]) -> None:
    old, new, since, gone = row
    assert number(since) <= number(minitron.__version__)[:2] < number(gone), "its time is over: remove name and row"
    module = re.fullmatch(r"module `(minitron\.[\w.]+)`", old)
    if module:
        assert importlib.import_module(module[1]) is not None
        assert importlib.import_module(re.sub(r"[`]", "", new)) is not None


def test_a_module_that_moved_warns() -> None:
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    from minitron.distill.train import train\n"
        "assert any(w.category is DeprecationWarning and 'minitron.train.loop' in str(w.message) for w in seen), seen\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_deprecation_of_the_code_is_in_the_table() -> None:
    table = read("docs/deprecations.md")
    for path in (ROOT / "src").rglob("*.py"):
        for old in re.findall(r"moved\(\s*__name__|moved\(\s*['\"]([\w.]+)", path.read_text(encoding="utf-8")):
            name = old or "minitron." + ".".join(path.relative_to(ROOT / "src/minitron").with_suffix("").parts)
            assert re.search(rf"`{re.escape(name)}[.`]", table), name


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_or_form_is_readable_and_its_targets_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert isinstance(yaml.safe_load(text), dict)
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z][a-z-]*)", text)) <= targets


def test_the_forms_of_issues_have_what_the_forge_requires() -> None:
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        form: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        if path.name == "config.yml":
            continue
        assert set(form) >= {"name", "description", "body"}
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids))
        assert all(field["attributes"]["label"] for field in form["body"])


def test_every_verb_has_a_trial_for_the_wheel() -> None:
    from typer.main import get_command

    from minitron.cli import app

    source = read("scripts/try_verbs.py")
    trials = set(re.findall(r'^    "([a-z-]+)": ', source, re.MULTILINE))
    assert set(get_command(app).commands) == trials - {"text.jsonl"}  # type: ignore[attr-defined]


def test_every_extra_has_a_trial_for_the_wheel() -> None:
    source = read("scripts/try_extras.py")
    trials = set(re.findall(r'^    "([a-z]+)": \(', source, re.MULTILINE))
    imported = set(re.findall(r'"([a-z]+)": "', re.findall(r"^IMPORTED = .*$", source, re.MULTILINE)[0]))
    declared = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    assert trials | imported == set(declared) - {"dev"}


def test_the_sdist_has_what_the_package_needs() -> None:
    """hatchling follows the link `recipes` instead of the folder that it leads to, unless it is told."""
    assert '"src/minitron/assets/recipes" = "src/minitron/assets/recipes"' in read("pyproject.toml")
    assert (ROOT / "recipes").is_symlink()
