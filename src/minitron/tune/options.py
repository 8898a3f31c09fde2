"""Options of the command line that are several values in one text."""

from __future__ import annotations

from collections.abc import Sequence


def field_names(texts: Sequence[str]) -> dict[str, str]:
    """`["text=body"]` as a mapping.

    Raises:
        ValueError: one has no `=`, or a field is named twice.
    """
    names: dict[str, str] = {}
    for text in texts:
        field, equals, name = text.partition("=")
        if not equals or not field or not name:
            raise ValueError(f"--field is {text!r}; it must be FIELD=NAME, such as text=body")
        if field in names:
            raise ValueError(f"--field names {field!r} twice: {names[field]!r} and {name!r}")
        names[field] = name
    return names


def column_names(text: str | None, option: str = "--columns") -> tuple[str, ...]:
    """`"label,title,text"` as names, of columns or what `option` takes.

    Raises:
        ValueError: a name is empty or given twice.
    """
    if text is None:
        return ()
    names = tuple(name.strip() for name in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{option} is {text!r}; it must be names separated by commas, each once")
    return names
