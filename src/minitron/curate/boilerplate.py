"""What publishers and web sites put around a text: Project Gutenberg's header and licence, and lines of menus."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from .recipe import Boilerplate
from .texts import Texts

_GUTENBERG = "PROJECT GUTENBERG"
_START = re.compile(r"^\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG[^\n]*\n+", re.IGNORECASE | re.MULTILINE)
_END = re.compile(r"^\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG", re.IGNORECASE | re.MULTILINE)
# A whole line, whatever its case; words in it may be followed by a name or a date.
_LINES = (
    r"(?:please )?(?:accept|manage|reject)(?: all)? cookies?",
    r"(?:this|our) (?:web ?)?site uses cookies.*",
    r"we use cookies.*",
    r"(?:by (?:continuing|using) .*)?cookie (?:policy|settings|preferences|notice)",
    r"privacy policy|terms (?:of|and) (?:use|service|conditions)|legal notice|disclaimer",
    r"(?:copyright|\(c\)|\u00a9)[ ,:]?.*|.*\ball rights reserved\b.*",
    r"(?:share|tweet|pin|like)(?: this| it)?(?: (?:on|via|to) .{1,40})?",
    r"(?:follow|find|join) us(?: (?:on|at) .{1,40})?",
    r"(?:read|learn|show|see|view|load) (?:more|less|all)(?: (?:about|from|posts|comments) .{0,60})?",
    r"(?:click|tap) here(?: .{0,60})?",
    r"(?:sign|log) ?(?:in|up|out)(?: (?:now|to|for|with) .{0,60})?|subscribe(?: (?:now|to|here) .{0,60})?",
    r"(?:skip|jump) to (?:main )?(?:content|navigation)|back to (?:the )?top|(?:next|previous) (?:post|page|article)",
    r"(?:leave|post|add) a (?:comment|reply)|\d+ comments?|no comments(?: yet)?|advertisement|sponsored(?: content)?",
    r"powered by .{1,40}|(?:enable|turn on) javascript.*|javascript is (?:disabled|required).*",
    r"home|menu|search|navigation|contact(?: us)?|about us|site ?map|rss(?: feed)?|print(?: this(?: page)?)?",
)
_BOILERPLATE = re.compile(rf"[\W_]*(?:{'|'.join(_LINES)})[\W_]*", re.IGNORECASE)


def cleaner(settings: Boilerplate) -> Callable[[Texts, Counter[str]], Texts]:
    """A function that removes boilerplate from texts and counts lines and headers; a text may become empty."""

    def run(texts: Texts, dropped: Counter[str]) -> Texts:
        return Texts.of([_cleaned(text, settings, dropped) for text in texts.to_list()])

    return run


def _cleaned(text: str, settings: Boilerplate, dropped: Counter[str]) -> str:
    if settings.gutenberg and (_GUTENBERG in text or _GUTENBERG.title() in text):
        text = _body(text, dropped)
    if not settings.lines:
        return text
    lines = text.split("\n")
    kept = [line for line in lines if not _is_boilerplate(line, settings.max_characters)]
    if len(kept) == len(lines):
        return text
    dropped["lines of web pages"] += len(lines) - len(kept)
    return "\n".join(kept).strip("\n")


def _is_boilerplate(line: str, longest: int) -> bool:
    return 0 < len(line) <= longest and _BOILERPLATE.fullmatch(line) is not None


def _body(text: str, dropped: Counter[str]) -> str:
    """What stands between Project Gutenberg's marks; the whole text if it has none."""
    start = _START.search(text)
    end = max(_END.finditer(text, start.end() if start else 0), key=lambda mark: mark.start(), default=None)
    first, last = (start.end() if start else 0), (end.start() if end else len(text))
    dropped["Gutenberg headers and licences"] += (start is not None) + (end is not None)
    return text[first:last].strip("\n") if start or end else text
