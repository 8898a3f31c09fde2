"""Code blocks and inline code of every document of the repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[2]
SKIPPED = "not run: "
"""How the HTML comment right before a block begins that no test runs."""


@dataclass(frozen=True)
class Block:
    """One code block."""

    document: str
    line: int
    """Of its fence, counted from 1."""
    language: str
    """What stands behind the fence; empty for an indented block too."""
    text: str
    reason: str | None
    """Why it is not run, as the document says."""

    @property
    def where(self) -> str:
        """For messages and names of tests."""
        return f"{self.document}:{self.line}"


def documents() -> list[Path]:
    """Every Markdown file of the repository but the list of changes, which quotes commands of earlier versions."""
    found = (path for path in ROOT.rglob("*.md") if not {part[0] for part in path.relative_to(ROOT).parts} & {"."})
    return sorted(path for path in found if path.name != "CHANGELOG.md" and "runs" not in path.parts)


def blocks() -> list[Block]:
    """All code blocks of all documents."""
    found: list[Block] = []
    for path in documents():
        before = ""
        for token in MarkdownIt("commonmark").parse(path.read_text(encoding="utf-8")):
            if token.type in ("fence", "code_block"):
                comment = before.strip().removeprefix("<!--").removesuffix("-->").strip()
                reason = comment.removeprefix(SKIPPED) if comment.startswith(SKIPPED) else None
                line = (token.map or [0])[0] + 1
                found.append(Block(str(path.relative_to(ROOT)), line, token.info, token.content, reason))
            before = token.content if token.type == "html_block" else ""
    return found


def inline_code() -> list[tuple[str, str]]:
    """(document, text) of every piece of code within a sentence or a table."""
    found: list[tuple[str, str]] = []
    for path in documents():
        for token in MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")):
            name = str(path.relative_to(ROOT))
            found += [(name, child.content) for child in token.children or [] if child.type == "code_inline"]
    return found
