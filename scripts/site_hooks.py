"""What MkDocs does besides its own work: generated pages, links that leave docs/, and the navigation.

Pages are generated from the commands, the docstrings, the recipes and the files beside the package, so none of them can
be out of date. A link to a file of the repository that is no page becomes its path.
"""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "scripts")]

import site_reference  # noqa: E402
from mkdocs.structure.files import File  # noqa: E402

LATER = ("cuda.md",)
"""Pages of the navigation that need not be there."""
COPIED = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
"""Files of the repository's root that are pages."""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Leave out of the navigation what is not there yet."""
    config.nav = _present(config.nav)
    return config


def _present(items: list[Any]) -> list[Any]:
    kept = []
    for item in items:
        if isinstance(item, dict):
            ((title, target),) = item.items()
            if isinstance(target, list):
                item = {title: _present(target)}
            elif target in LATER and not (ROOT / "docs" / target).exists():
                continue
        kept.append(item)
    return kept


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    pages = {
        "reference/commands.md": site_reference.commands(),
        "reference/python.md": site_reference.python(),
        "reference/recipes.md": site_reference.recipes(),
        "reference/reports.md": site_reference.reports(),
    }
    pages |= {f"project/{name}": (ROOT / name).read_text(encoding="utf-8") for name in COPIED}
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as the site needs them; paths in the repository's root files are relative to the root."""
    uri = page.file.src_uri
    here = posixpath.dirname(uri) if not uri.startswith("project/") else ".."

    def link(match: re.Match[str]) -> str:
        picture, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join("docs", here, target))
        inside = posixpath.relpath(path, "docs")
        moved = f"project/{path}" if path in COPIED else inside
        if files.get_file_from_path(moved):
            return f"{picture}[{text}]({posixpath.relpath(moved, posixpath.dirname(uri) or '.')}{anchor})"
        if not (ROOT / path).exists():
            return match[0]  # MkDocs reports it
        name = text.strip("`")
        return f"`{path}`" if name == path else f"{text} (`{path}`)"

    return _outside_code(markdown, lambda text: _LINK.sub(link, text))


def _outside_code(markdown: str, change: Any) -> str:
    parts = re.split(r"(^```.*?^```[^\n]*$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else change(part) for part in parts)
