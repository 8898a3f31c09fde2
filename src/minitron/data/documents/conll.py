"""CoNLL files: a word and its tag on each line, an empty line between sentences."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .formats import MARK_BYTES, encoding_of, open_bytes
from .problems import BadFileError
from .rows import Found, not_text


def tagged_sentences(path: Path, field: str | None, encoding: str) -> Iterator[Found]:
    """Sentences as rows with `tokens` and `tags`: the first and the last column of each line.

    Lines that begin with `-DOCSTART-` or with `#` and have a single column are skipped.
    """
    words: list[str] = []
    tags: list[str] = []
    begins = 1
    for number, line in enumerate([*_lines(path, encoding), ""], 1):
        columns = line.split("\t") if "\t" in line else line.split()
        if not line.strip():
            if words:
                yield f"line {begins}", {"tokens": words, "tags": tags}
            words, tags, begins = [], [], number + 1
        elif len(columns) < 2:
            if columns[0].startswith(("-DOCSTART-", "#")):
                begins = number + 1
                continue
            raise BadFileError(f"line {number} has one column; expected a word and its tag")
        elif columns[0] != "-DOCSTART-":
            words.append(columns[0].strip())
            tags.append(columns[-1].strip())


def _lines(path: Path, encoding: str) -> list[str]:
    with open_bytes(path) as raw:
        content = raw.read()
    name, mark = encoding_of(content[:MARK_BYTES], encoding)
    try:
        return content[mark:].decode(name).replace("\r\n", "\n").split("\n")
    except UnicodeDecodeError as error:
        raise BadFileError(not_text(error, name)) from None
