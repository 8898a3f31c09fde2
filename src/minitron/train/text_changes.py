"""How the text of two runs differs, file by file, so that a message names the file that changed and not a hash."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MOST_NAMES = 5


def text_changes(before: Sequence[Mapping[str, Any]] | None, now: Sequence[Mapping[str, Any]]) -> str:
    """What differs between two descriptions, in a few clauses; empty if nothing does, or if that is not known.

    Args:
        before: `origins` of a stream; None if it was not written down.
        now: the same of the text that is given now.
    """
    if before is None or not all(source.get("files") for source in (*before, *now)):
        return ""
    if len(before) != len(now):
        return f"{len(before)} sources of text were given, {len(now)} are given now"
    return "; ".join(clause for old, new in zip(before, now, strict=True) for clause in _clauses(old, new))


def _clauses(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    was, now = dict(old["files"]), dict(new["files"])
    gone, come = [n for n in was if n not in now], [n for n in now if n not in was]
    renamed = [(n, m) for n in gone for m in come if was[n] == now[m]]
    gone = [n for n in gone if n not in {pair[0] for pair in renamed}]
    come = [n for n in come if n not in {pair[1] for pair in renamed}]
    yield from _named("changed", [n for n in now if n in was and was[n] != now[n]])
    yield from _named("removed", gone)
    yield from _named("added", come)
    yield from _named("renamed", [f"{n} (now {m})" for n, m in renamed])
    if was == now and list(was) != list(now):
        yield "the files are in another order"
    if old.get("tokenizer") != new.get("tokenizer"):
        yield "the tokenizer changed"
    for key in ("weight", "field", "encoding", "skip_bad"):
        if old.get(key) != new.get(key):
            yield f"{key} of {next(iter(now))} was {old.get(key)!r}, is {new.get(key)!r}"


def _named(what: str, names: list[str]) -> Iterator[str]:
    if names:
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        yield f"{what}: {', '.join(names[:_MOST_NAMES])}{more}"
