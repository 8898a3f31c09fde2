"""A run whose text changed is told which file it was, not two hashes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from text_checkpoint import save_byte_tokenizer

from minitron.data.packing import BlockStream
from minitron.tokenizer import load_tokenizer
from minitron.train.inputs import open_texts
from minitron.train.schedule import TrainConfig
from minitron.train.text_changes import text_changes


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.txt", "b.txt", "sub/c.txt"):
        (folder / name).write_text(f"this is the text of {name}, with a few words in it. " * 5)
    save_byte_tokenizer(tmp_path / "tokenizer")
    return folder


def stream(corpus: Path, *data: str, tokenizer: str = "tokenizer", **options: Any) -> BlockStream:
    encoder: Any = load_tokenizer(corpus.parent / tokenizer)
    settings = TrainConfig(steps=1, sequence=16)
    return open_texts(data or [str(corpus)], [], 0, encoder, settings, corpus.parent / "cache", **options).stream


def remember(made: BlockStream) -> Any:
    return json.loads(json.dumps(made.origins))


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda c: (c / "b.txt").write_text("something else"), "changed: b.txt"),
    (lambda c: (c / "sub" / "c.txt").write_text("else"), "changed: sub/c.txt"),
    (lambda c: (c / "b.txt").unlink(), "removed: b.txt"),
    (lambda c: (c / "d.txt").write_text("new"), "added: d.txt"),
    (lambda c: (c / "b.txt").rename(c / "0.txt"), "renamed: b.txt (now 0.txt)"),
    (lambda c: ((c / "a.txt").unlink(), (c / "d.txt").write_text("new")), "removed: a.txt; added: d.txt"),
    (
        lambda c: [(c / f"{i}.txt").write_text(str(i)) for i in range(7)],
        "added: 0.txt, 1.txt, 2.txt, 3.txt, 4.txt and 2 more",
    ),
    (lambda c: os.utime(c / "a.txt", (1, 1)), ""),
]  # fmt: skip


@pytest.mark.parametrize(("change", "says"), CHANGES)
def test_the_file_is_named(corpus: Path, change: Callable[[Path], object], says: str) -> None:
    before = remember(stream(corpus))
    change(corpus)
    assert text_changes(before, stream(corpus).origins) == says


def test_how_the_text_is_read_is_told_too(corpus: Path) -> None:
    before = remember(stream(corpus))
    assert text_changes(before, stream(corpus, f"{corpus}:2").origins) == "weight of a.txt was 1.0, is 2.0"
    save_byte_tokenizer(corpus.parent / "other", extra=1)
    assert text_changes(before, stream(corpus, tokenizer="other").origins) == "the tokenizer changed"
    latin = stream(corpus, encoding="latin-1").origins
    assert text_changes(before, latin) == "encoding of a.txt was 'utf-8', is 'latin-1'"
    two = stream(corpus, str(corpus / "a.txt"), str(corpus / "b.txt")).origins
    assert text_changes(before, two) == "1 sources of text were given, 2 are given now"
    assert text_changes(None, two) == ""


def test_it_does_not_matter_where_the_folder_lies(corpus: Path) -> None:
    before = remember(stream(corpus))
    moved = corpus.rename(corpus.with_name("moved"))
    assert text_changes(before, stream(moved).origins) == ""
