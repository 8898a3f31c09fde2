"""The documentation site: built with warnings as errors, complete, and without anything from outside."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

import minitron
from minitron.cli import app

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
GENERATED = {f"reference/{name}.md" for name in ("commands", "python", "recipes", "reports")}
COPIED = {f"project/{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY")}
LATER = {"cuda.md"}
"""In the navigation from the day on that it is there; `scripts/site_hooks.py` leaves it out before."""


def script(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return module


def listed() -> list[str]:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")

    def targets(item: Any) -> list[str]:
        if isinstance(item, str):
            return [item]
        values = item.values() if isinstance(item, dict) else item
        return [target for value in values for target in targets(value)]

    return targets(yaml.safe_load(text[text.index("\nnav:") :])["nav"])


def test_every_document_is_in_the_navigation_once() -> None:
    found = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | GENERATED | COPIED
    assert found - set(listed()) == set(), "add these to the navigation in mkdocs.yml"
    assert set(listed()) - found <= LATER
    assert len(listed()) == len(set(listed()))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(target)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def pages(site: Path) -> list[Path]:
    return [path for path in sorted(site.rglob("*.html")) if "reports" not in path.parts]


def test_nothing_comes_from_outside(site: Path) -> None:
    for page in pages(site):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*?\bsrc=[\"']?([^\"'\s>]+)", text)
        loaded += re.findall(r"<link\b[^>]*?\bhref=[\"']?([^\"'\s>]+)", text)
        assert [url for url in loaded if re.match(r"(https?:)?//", url)] == [], page
    sheets = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"url\([\"']?(https?:)?//|@import", sheets)


def test_links_and_anchors_lead_somewhere(site: Path) -> None:
    anchors: dict[Path, set[str]] = {}

    def ids(page: Path) -> set[str]:
        if page not in anchors:
            anchors[page] = set(re.findall(r"\bid=[\"']?([^\"'\s>]+)", page.read_text(encoding="utf-8")))
        return anchors[page]

    for page in pages(site):
        if page.name == "404.html":  # its links are absolute
            continue
        for link in re.findall(r"\bhref=[\"']?([^\"'\s>]+)", page.read_text(encoding="utf-8")):
            parts = urlsplit(unescape(link))
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{page.relative_to(site)}: {link}"
            if parts.fragment and target.suffix == ".html" and "reports" not in target.parts:
                assert unquote(parts.fragment) in ids(target), f"{page.relative_to(site)}: {link}"


def test_search_works_without_a_server(site: Path) -> None:
    assert "squared ReLU" in (site / "search" / "search_index.js").read_text(encoding="utf-8")
    assert "site/iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")


def test_the_reference_has_every_verb_option_and_public_name(site: Path) -> None:
    from typer.main import get_command

    commands = unescape((site / "reference" / "commands.html").read_text(encoding="utf-8"))
    for verb, command in get_command(app).commands.items():  # type: ignore[attr-defined]
        assert f'id="{verb}"' in commands or f'id="{verb}-' in commands, verb
        for option in getattr(command, "params", []):
            for name in option.opts if option.param_type_name == "option" and option.name != "help" else []:
                assert name in commands, (verb, name)
    names = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in minitron.__all__:
        assert f"minitron.{name}" in names, name


def test_the_pictures_are_what_the_script_draws() -> None:
    for path, draw in script("pictures").PICTURES.items():
        assert path.read_text(encoding="utf-8") == draw(), "run python scripts/pictures.py"


def test_every_picture_of_a_document_is_drawn_or_a_plot_of_a_study() -> None:
    drawn = set(script("pictures").PICTURES)
    for path in DOCS.rglob("*.svg"):
        assert path in drawn, path
