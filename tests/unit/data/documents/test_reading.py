"""One text, whatever file holds it; and every document that cannot be used is named at once."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minitron.data.documents import BadTextError, DataError, Problems, Source, read_all, read_documents

pyarrow = pytest.importorskip("pyarrow")


def write_parquet(path: Path, text: Any) -> None:
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": [text]}), path)


def write_arrow(path: Path, text: Any) -> None:
    table = pyarrow.table({"text": [text]})
    with pyarrow.ipc.new_file(str(path), table.schema) as sink:
        sink.write_table(table)


def write_zst(path: Path, content: bytes) -> None:
    with pyarrow.output_stream(str(path), compression="zstd") as sink:
        sink.write(content)


def row(text: str, **how: Any) -> bytes:
    return json.dumps({"id": 1, "text": text}, **how).encode()


CONTAINERS: dict[str, Callable[[Path, str], object]] = {
    "a.txt": lambda path, text: path.write_bytes(text.encode()),
    "mark.TXT": lambda path, text: path.write_bytes(codecs.BOM_UTF8 + text.encode()),
    "utf16.txt": lambda path, text: path.write_bytes(codecs.BOM_UTF16_LE + text.encode("utf-16-le")),
    "utf16be.md": lambda path, text: path.write_bytes(codecs.BOM_UTF16_BE + text.encode("utf-16-be")),
    "utf32.txt": lambda path, text: path.write_bytes(codecs.BOM_UTF32_LE + text.encode("utf-32-le")),
    "a.txt.gz": lambda path, text: path.write_bytes(gzip.compress(text.encode())),
    "a.md.XZ": lambda path, text: path.write_bytes(lzma.compress(text.encode())),
    "a.txt.bz2": lambda path, text: path.write_bytes(bz2.compress(text.encode())),
    "a.txt.zst": lambda path, text: write_zst(path, text.encode()),
    "a.jsonl": lambda path, text: path.write_bytes(row(text) + b"\n"),
    "A.JSONL": lambda path, text: path.write_bytes(codecs.BOM_UTF8 + row(text, ensure_ascii=False) + b"\r\n\r\n"),
    "utf16.jsonl": lambda path, text: path.write_bytes(row(text, ensure_ascii=False).decode().encode("utf-16")),
    "a.ndjson.bz2": lambda path, text: path.write_bytes(bz2.compress(row(text))),
    "lines.json": lambda path, text: path.write_bytes(row(text) + b"\n"),
    "array.json": lambda path, text: path.write_text(json.dumps([{"text": text}], indent=2)),
    "object.json": lambda path, text: path.write_text(json.dumps({"text": text}, indent=2)),
    "a.json.gz": lambda path, text: path.write_bytes(gzip.compress(b"[" + row(text) + b"]")),
    "a.parquet": write_parquet,
    "bytes.parquet": lambda path, text: write_parquet(path, text.encode()),
    "a.arrow": write_arrow,
}


def universal(text: str) -> str:
    """Python's own universal line ends, without marks at the head."""
    return io.StringIO(text.lstrip("\ufeff"), newline=None).read()


@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize(
    "text",
    [
        "one\r\ntwo\rthree\n\rfour\r\r\n",
        "\ufeffmark\ufeff inside stays",
        "form\x0cfeed, \x1c \x1d \x1e separators, \x85 next line, \u2028 \u2029 and \x0b are text\n",
        "na\u00efve \u4f60\u597d \U0001f600 \x01\x7f",
    ],
)
def test_a_text_is_the_same_in_every_container(tmp_path: Path, name: str, text: str) -> None:
    CONTAINERS[name](tmp_path / name, text)
    assert list(read_documents(tmp_path / name)) == [universal(text)]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_the_same_in_every_container(tmp_path: Path, text: str) -> None:
    expected = [universal(text)] if universal(text).strip() else []
    for name in ("a.txt", "mark.TXT", "utf16.txt", "a.txt.gz", "a.jsonl", "A.JSONL", "utf16.jsonl", "array.json"):
        CONTAINERS[name](tmp_path / name, text)
        assert list(read_documents(tmp_path / name)) == expected, name


def test_lines_of_json_lines_end_as_lines_of_text_do(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for end in (b"\n", b"\r\n", b"\r"):
        # Joined files have marks in the middle; U+2028 may stand in JSON as it is.
        path.write_bytes(end.join([row("a"), codecs.BOM_UTF8 + row("b\u2028c", ensure_ascii=False), b"", row("d")]))
        assert list(read_documents(path)) == ["a", "b\u2028c", "d"]


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("cp1252", "\u201cna\u00efve\u201d \u2013 \u20ac5"), ("shift_jis", "\u65e5\u672c\u8a9e\u306e\u8868"),
     ("gb18030", "\u4f60\u597d"), ("cp037", "of a mainframe"), ("utf-16-le", "without a mark")],
)  # fmt: skip
def test_an_encoding_can_be_named_and_a_mark_is_stronger(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(f"{text}\r\nend".encode(encoding))
    (tmp_path / "b.jsonl").write_bytes(f'{{"text": "{text}"}}\n{{"text": "end"}}\n'.encode(encoding))
    (tmp_path / "c.txt").write_bytes(codecs.BOM_UTF8 + text.encode())
    read = [list(read_documents(tmp_path / name, encoding=encoding)) for name in ("a.txt", "b.jsonl", "c.txt")]
    assert read == [[f"{text}\nend"], [text, "end"], [text]]


@pytest.mark.parametrize("encoding", ["nothing", "hex", "rot13", "", "utf-8\0"])
def test_what_is_no_encoding_of_text_is_refused(encoding: str) -> None:
    with pytest.raises(DataError, match="not an encoding of text; expected one like utf-8, cp1252"):
        Source("a.txt", encoding=encoding)


BAD: list[tuple[str, bytes, str]] = [
    ("a.txt", b"one\ntwo \x93quoted\x94", "a.txt: not UTF-8 text (invalid start byte: byte 0x93) in line 2"),
    ("a.txt", b"cut \xe2\x82", "a.txt: not UTF-8 text (unexpected end of data: byte 0xe2) in line 1"),
    ("a.txt", b"\xed\xa0\x80 surrogate", "a.txt: not UTF-8 text (invalid continuation byte: byte 0xed)"),
    ("a.txt", b"\xff\xfeodd", "a.txt: not utf-16-le text (truncated data"),
    ("a.txt", b"a\nb\0c", "a.txt: holds NUL bytes, first in line 2"),
    ("a.txt", "no mark".encode("utf-16-le"), "or UTF-16 without a byte-order mark"),
    ("a.txt", gzip.compress(b"x", mtime=0), "a.txt: is gzip, not text"),
    ("a.md", b"%PDF-1.7\n", "a.md: is PDF, not text"),
    ("a.jsonl", b"PK\x03\x04", "a.jsonl: is a zip archive, not text"),
    ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1: holds the lone surrogate '\\ud800' at character 1"),
    ("a.jsonl", b'{"text": "ab\\udfff"}', "line 1: holds the lone surrogate '\\udfff' at character 3"),
    ("a.jsonl", b'{"text": "x\\u0000"}', "a.jsonl, line 1: holds NUL bytes"),
    ("a.jsonl", b'\n{"text": "\xe9t\xe9"}', "a.jsonl, line 2: not UTF-8 text (invalid continuation byte: byte 0xe9)"),
    ("a.jsonl", b'{"text": null}', "string in the field 'text'; it holds null"),
    ("a.jsonl", b'{"text": 3.5}', "string in the field 'text'; it holds 3.5"),
    ("a.jsonl", b'{"text": true}', "string in the field 'text'; it holds true"),
    ("a.jsonl", b'{"text": ["a", "b"]}', "string in the field 'text'; it holds a list of 2"),
    ("a.jsonl", b'{"text": {"body": "x"}}', "it holds an object with the fields: body"),
    ("a.jsonl", b'{"body": "x", "id": 1}', "string in the field 'text'; the object has the fields: body, id"),
    ("a.jsonl", b"[1]", "a.jsonl, line 1: expected an object with a string in the field 'text'; found a list of 1"),
    ("a.jsonl", b'"text"', 'a.jsonl, line 1: expected an object with a string in the field \'text\'; found "text"'),
    ("a.jsonl", b"null", "a.jsonl, line 1: expected an object"),
    ("a.jsonl", b'{"text": "x"', "a.jsonl, line 1: not JSON (Expecting ',' delimiter at column 13)"),
    ("a.jsonl", b"[" * 100_000, "a.jsonl, line 1: not JSON that can be read"),
    ("a.jsonl", b'{"n": ' + b"9" * 5000 + b"}", "a.jsonl, line 1: not JSON that can be read"),
    ("a.json", b'[{"text": "x"}, {"text": 1}]', "a.json, item 2: expected an object with a string"),
    ("a.json", b'{"data": [\n{"text": "x"}]}', "a.json: expected an object with a string in the field 'text'; the "),
    ("a.json", b'[{"text": "x"},\n', "a.json: not JSON (Expecting value in line 2, column 1)"),
    ("a.json", b"[" * 100_000, "a.json: not JSON that can be read"),
    ("a.jsonl.gz", gzip.compress(b"{}", mtime=0)[:9], "a.jsonl.gz: damaged or cut short"),
    ("a.txt.gz", b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"z" * 40, "a.txt.gz: damaged or cut short"),
    ("a.txt.bz2", b"BZh9" + b"z" * 40, "a.txt.bz2: damaged or cut short"),
    ("a.txt.xz", lzma.compress(b"x" * 99)[:-7], "a.txt.xz: damaged or cut short"),
    ("a.txt.zst", b"no zstd at all", "a.txt.zst: damaged or cut short"),
    ("a.parquet", b"", "a.parquet: damaged or cut short"),
    ("a.arrow", b"ARROW1\0\0", "a.arrow: damaged or cut short"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "says"), BAD)
def test_what_is_no_document_is_told_with_its_place(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="^" + str(tmp_path)) as error:
        list(read_documents(tmp_path / name))
    assert says in str(error.value)


def test_tables_tell_the_row(tmp_path: Path) -> None:
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.table({"text": ["a", None], "n": [1, 2], "b": [b"ok", b"\xff"]}), tmp_path / "a.parquet"
    )
    for field, says in (
        ("text", "row 2: expected a string in the column 'text'; found null"),
        ("n", "row 1: expected a string in the column 'n'; found 1"),
        ("b", "row 2: not UTF-8 text (invalid start byte: byte 0xff)"),
        ("c", "no column 'c'; the columns are: text, n, b"),
    ):
        with pytest.raises(DataError) as error:
            list(read_documents(tmp_path / "a.parquet", field))
        assert says in str(error.value)
    offsets = pyarrow.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0]))
    broken = pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"ok\xff\xff"))
    twice = pyarrow.Table.from_arrays([broken, broken], names=["text", "text"])
    for table, says in ((pyarrow.table({"text": broken}), "row 2: not UTF-8"), (twice, "2 columns are named 'text'")):
        with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as sink:
            sink.write_table(table)
        with pytest.raises(DataError, match=says):
            list(read_documents(tmp_path / "a.arrow"))


def test_every_bad_document_is_in_one_message_and_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": null}\n\xff\n{"text": "  "}\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_bytes("d\u00e9j\u00e0".encode("cp1252"))
    (tmp_path / "c.txt").write_bytes(b"three")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "four"}\n' * 50, mtime=0)[:-9])
    (tmp_path / "e.txt").symlink_to(tmp_path / "nothing")
    files = Source(str(tmp_path)).files()
    strict = Problems()
    good = list(read_all(files, "text", "utf-8", strict))
    assert good == ["one", "two", "three", *["four"] * 50]
    with pytest.raises(BadTextError) as error:
        strict.raise_any()
    lines = str(error.value).splitlines()
    assert lines[0] == "5 documents in 4 files cannot be used:"
    assert [line.strip().removeprefix(f"{tmp_path}/").split(":")[0] for line in lines[1:]] == [
        "a.jsonl, line 2", "a.jsonl, line 3", "b.txt", "d.jsonl.gz", "e.txt"
    ]  # fmt: skip
    assert lines[-1].endswith("e.txt: cannot be read (No such file or directory)")
    lenient = Problems(skip=True)
    assert list(read_all(files, "text", "utf-8", lenient)) == good
    lenient.raise_any()
    assert lenient.notes()[0] == "1 documents hold nothing but white space and were skipped"
    assert lenient.notes()[1].startswith("5 bad documents in 4 files were skipped: ")


def test_a_wrong_field_does_not_read_or_list_everything(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number:02}.jsonl").write_bytes(b'{"body": "x"}\n' * 5000)
    problems = Problems()
    assert list(read_all(Source(str(tmp_path)).files(), "text", "utf-8", problems)) == []
    with pytest.raises(BadTextError) as error:
        problems.raise_any()
    lines = str(error.value).splitlines()
    assert lines[0] == "1,000 or more documents in 10 files cannot be used:"
    assert len(lines) == 22
    assert lines[-1] == "  and 980 or more others"
