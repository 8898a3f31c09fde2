"""Which files a folder or a pattern means, and what is said of the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minitron.data.documents import DataError, Source


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("text")


def names(folder: Path, pattern: str = "") -> list[str]:
    return [str(path.relative_to(folder)) for path in Source(str(folder / pattern)).files()]


def test_a_folder_means_text_of_every_spelling_and_nothing_hidden(tmp_path: Path) -> None:
    make(tmp_path, "a.TXT", "b.JSONL", "c.json", "d.Md", "sub/e.ndjson", "sub/f.txt.GZ", "g.jsonl.bz2", "h.Parquet")
    make(tmp_path, "._a.txt", ".DS_Store", ".git/config", ".git/note.txt", ".ipynb_checkpoints/x.md", "sub/.h.jsonl")
    make(tmp_path, "a.pdf", "b.PDF", "c.docx", "LICENSE", "d.csv.gz", "e.parquet.gz")
    found = Source(str(tmp_path)).listing()
    assert [str(p.relative_to(tmp_path)) for p in found.files] == [
        "a.TXT", "b.JSONL", "c.json", "d.Md", "g.jsonl.bz2", "h.Parquet", "sub/e.ndjson", "sub/f.txt.GZ"
    ]  # fmt: skip
    assert found.notes == [
        f"{tmp_path}: 8 files are read; skipped: 1 .docx, 2 .gz, 2 .pdf, 2 hidden, 1 of another kind"
    ]
    assert Source(str(tmp_path / "sub")).listing().notes == [f"{tmp_path}/sub: 2 files are read; skipped: 1 hidden"]
    assert Source(str(tmp_path / "a.TXT")).listing().notes == []


def test_a_named_file_is_read_or_refused_and_a_pattern_is_as_a_folder(tmp_path: Path) -> None:
    make(tmp_path, ".hidden.txt", "a.docx", "b.txt", ".corpus/c.txt", "brackets[1].txt", "d.jsonl")
    assert names(tmp_path, ".hidden.txt") == [".hidden.txt"]
    assert names(tmp_path, ".corpus") == [".corpus/c.txt"]
    assert names(tmp_path, "brackets[1].txt") == ["brackets[1].txt"]
    with pytest.raises(DataError, match=r"a\.docx: unknown kind of text file; known: \.txt, \.md, \.jsonl"):
        Source(str(tmp_path / "a.docx")).files()
    found = Source(str(tmp_path / "*")).listing()
    assert [path.name for path in found.files] == ["b.txt", "brackets[1].txt", "d.jsonl"]
    assert found.notes == [f"{tmp_path}/*: 3 files are read; skipped: 1 .docx"]
    with pytest.raises(FileNotFoundError, match=r"no text file there \(known: .*\); found only 1 \.docx$"):
        Source(str(tmp_path / "*.docx")).files()
    with pytest.raises(DataError, match="data is an empty name"):
        Source("").files()


def test_links_are_followed_once_and_outputs_are_no_text(tmp_path: Path) -> None:
    make(tmp_path, "corpus/a.txt", "other/b.txt", "corpus/run/train.json", "corpus/run/metrics.jsonl")
    make(tmp_path, "corpus/model/config.json", "corpus/model/tokenizer.json", "corpus/model/README.md")
    make(tmp_path, "corpus/train.json", "corpus/test.json")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "corpus")
    os.mkfifo(tmp_path / "corpus" / "pipe.txt")
    found = Source(str(tmp_path / "corpus")).listing()
    assert [str(p.relative_to(tmp_path / "corpus")) for p in found.files] == [
        "a.txt", "linked/b.txt", "test.json", "train.json"
    ]  # fmt: skip
    assert found.notes[0].endswith("skipped: 5 in folders of checkpoints or runs, 1 of another kind")


def test_weights(tmp_path: Path) -> None:
    for weight in ("0", "-1", "nan", "inf", "1e400"):
        with pytest.raises(DataError, match="must be greater than 0 and finite"):
            Source.parse(f"a.txt:{weight}")
    assert Source.parse("a.txt:2", "body", "cp1252", True) == Source("a.txt", 2.0, "body", "cp1252", True)
