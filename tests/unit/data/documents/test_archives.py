"""Web archives that are written here byte by byte."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from minitron.data.documents import DataError, read_documents
from minitron.data.documents.archives import archive_records
from minitron.data.documents.problems import Bad

pytest.importorskip("resiliparse", reason="pip install 'minitron[curate]'")

PAGE = (
    "<html><head><title>T</title><script>var x = 1;</script></head><body>"
    "<nav><ul><li><a href='/'>Home</a></li></ul></nav>"
    "<main><article><h1>A caf\u00e9</h1><p>{text}</p><p>A second paragraph, which is long enough to be text.</p>"
    "</article></main><footer>Imprint</footer></body></html>"
)


def record(kind: str, content_type: str, body: bytes, address: str = "http://example.org/a") -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {address}\r\nContent-Type: {content_type}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body + b"\r\n\r\n"


def response(body: bytes, content_type: str = "text/html; charset=utf-8", status: str = "200 OK") -> bytes:
    http = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    return record("response", "application/http; msgtype=response", http)


def test_pages_give_their_main_text(tmp_path: Path) -> None:
    sentence = "This is the text of the page, and it says enough to be the main part of it. " * 3
    html = PAGE.format(text=sentence)
    path = tmp_path / "crawl.warc.gz"
    content = [
        record("warcinfo", "application/warc-fields", b"software: x"),
        record("request", "application/http; msgtype=request", b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n"),
        response(html.encode()),
        response(html.encode("latin-1"), "text/html; charset=iso-8859-1"),
        response(html.encode(), status="404 Not Found"),
        response(b"\x89PNG\r\n", "image/png"),
        record("conversion", "text/plain", b"Plain text of a WET file.\n"),
    ]
    path.write_bytes(b"".join(gzip.compress(part) for part in content))
    found = list(archive_records(path, "text", "utf-8"))
    assert [place for place, _ in found] == [f"record {n}, http://example.org/a" for n in (1, 2, 5)]
    texts = [str(text) for _, text in found]
    assert texts[0] == texts[1]
    assert sentence.strip() in texts[0]
    assert "caf\u00e9" in texts[0]
    assert "var x" not in texts[0]
    assert "Imprint" not in texts[0]
    assert texts[2] == "Plain text of a WET file.\n"
    assert list(read_documents(path)) == texts


def test_wet_files_are_known_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "crawl.warc.wet"
    path.write_bytes(record("conversion", "text/plain", b"One.") + record("conversion", "text/plain", b"Two."))
    assert list(read_documents(path)) == ["One.", "Two."]


def test_damage_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(record("conversion", "text/plain", bytes(range(97, 122)) * 400) for _ in range(50)))
    cut = tmp_path / "cut.warc.gz"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.warc\.gz: damaged or cut short"):
        list(read_documents(cut))
    other = tmp_path / "other.warc"
    other.write_bytes(b"no archive at all " * 100)
    with pytest.raises(DataError, match=r"other\.warc: damaged or cut short \(Invalid WARC header\)"):
        list(read_documents(other))
    other.write_bytes(record("warcinfo", "application/warc-fields", b"software: x"))
    with pytest.raises(DataError, match=r"other\.warc: holds no record of a page"):
        list(read_documents(other))


def test_a_page_that_is_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.data.documents.archives.MAX_RECORD_BYTES", 10)
    path = tmp_path / "a.warc"
    path.write_bytes(record("conversion", "text/plain", b"x" * 11) + record("conversion", "text/plain", b"x" * 10))
    found = [text for _, text in archive_records(path, "text", "utf-8")]
    assert isinstance(found[0], Bad)
    assert found[0].what == "longer than 10 bytes"
    assert found[1] == "x" * 10
