"""Token caches: what they are made of, what they are named for, and what a refused run leaves of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron.data.documents import BadTextError, DataError, Source
from minitron.data.token_cache import TokenFolder, tokenize, tokenize_all


class ByteTokenizer:
    """One token per byte."""

    bos_token_id = None
    eos_token_id = None

    def __call__(self, text: list[str], *, add_special_tokens: bool, verbose: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[list(t.encode()) for t in text])

    def __len__(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(256)}


def tokens(path: Path, folder: Path, **how: object) -> list[int]:
    return tokenize(Source(str(path), **how), ByteTokenizer(), folder).tokens.tolist()  # type: ignore[arg-type]


def test_the_same_text_gives_the_same_tokens_and_a_mark_gives_none(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "\ufeffone\r\ntwo\r"}))
    wanted = list(b"one\ntwo\n")
    assert tokens(tmp_path / "a.txt", tmp_path / "cache") == wanted
    assert tokens(tmp_path / "b.jsonl", tmp_path / "cache") == wanted


def test_a_cache_is_never_taken_for_that_of_another_reading(tmp_path: Path) -> None:
    content = b'{"text": "\xe2\x82\xac", "body": "b"}'
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_bytes(content)
    cache = tmp_path / "cache"
    assert tokens(tmp_path / "a.txt", cache) == list(content)
    assert tokens(tmp_path / "a.jsonl", cache) == list("\u20ac".encode())
    assert tokens(tmp_path / "a.jsonl", cache, field="body") == list(b"b")
    assert tokens(tmp_path / "a.jsonl", cache, encoding="cp1252") == list(content[10:13].decode("cp1252").encode())
    (tmp_path / "a.jsonl").write_bytes(content + b"\n{}")
    assert tokens(tmp_path / "a.jsonl", cache, skip_bad=True) == list("\u20ac".encode())
    with pytest.raises(BadTextError, match="line 2"):
        tokens(tmp_path / "a.jsonl", cache)


def test_bad_documents_of_all_sources_are_one_error_and_leave_nothing(tmp_path: Path) -> None:
    names = ("a.txt", "good.txt", "b.jsonl")
    for name, content in zip(names, (b"\xff", b"fine", b'{"text": 1}\n{"text": "x"}'), strict=True):
        (tmp_path / name).write_bytes(content)
    sources = [Source(str(tmp_path / name)) for name in names]
    with pytest.raises(BadTextError) as error:
        tokenize_all(sources, ByteTokenizer(), tmp_path / "runs" / "cache")
    assert [line.strip() for line in str(error.value).splitlines()] == [
        "2 documents in 2 files cannot be used:",
        f"{tmp_path}/a.txt: not UTF-8 text (invalid start byte: byte 0xff) in line 1",
        f"{tmp_path}/b.jsonl, line 1: expected an object with a string in the field 'text'; it holds 1",
    ]
    assert not (tmp_path / "runs").exists()
    with pytest.raises(DataError, match=r"a\.txt: no text in it; 1 bad documents in 1 file were skipped: "):
        tokenize(Source(str(tmp_path / "a.txt"), skip_bad=True), ByteTokenizer(), tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_what_was_left_out_is_told_again_when_the_cache_is_there(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.jsonl").write_text('{"text": "x"}\n{"text": null}\n{"text": " "}\n')
    (tmp_path / "text" / "b.pdf").write_text("")
    source = Source(str(tmp_path / "text"), skip_bad=True)
    first, again = (tokenize(source, ByteTokenizer(), tmp_path / "cache").notes for _ in range(2))
    assert first == again
    assert [note.split(": ", 1)[-1][:30] for note in first] == [
        "1 file is read; skipped: 1 .pd", "1 documents hold nothing but w", f"{tmp_path}/text/a.jsonl, line"[:30]
    ]  # fmt: skip


def test_a_folder_takes_back_what_was_made_for_a_refused_run(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    tokens(tmp_path / "a.txt", tmp_path / "shared")

    def refused_run(path: Path, accepted: bool = False) -> None:
        with TokenFolder(path) as folder:
            for name in ("a.txt", "b.txt"):
                tokenize(Source(str(tmp_path / name)), ByteTokenizer(), folder)
            if accepted:
                folder.keep()
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        refused_run(tmp_path / "shared")
    assert [path.name[:2] for path in (tmp_path / "shared").iterdir()] == ["a-"]  # it was there before
    with pytest.raises(ValueError, match="refused"):
        refused_run(tmp_path / "new" / "cache")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="refused"):
        refused_run(tmp_path / "new" / "cache", accepted=True)
    assert len(list((tmp_path / "new" / "cache").iterdir())) == 2
