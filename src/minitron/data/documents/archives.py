"""Web archives (WARC, WET) as documents: the main text of each HTML page, and texts as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .formats import open_bytes
from .problems import Bad, BadFileError, DataError
from .rows import Found

MAX_RECORD_BYTES = 64_000_000
"""A longer page is not read."""
_SHOWN_ADDRESS = 200


def archive_records(path: Path, field: str, encoding: str) -> Iterator[Found]:
    """The pages of a web archive, each with its number and address; other records (requests, metadata, images) are
    skipped. The encoding of a page is what its bytes and its header say."""
    iterate, kinds = _library(path)
    number = 0
    with open_bytes(path) as raw:
        for record in iterate(raw, record_types=kinds.response | kinds.conversion, parse_http=True):
            number += 1
            place = f"record {number}, {record.headers.get('WARC-Target-URI') or 'no address'}"[:_SHOWN_ADDRESS]
            kind = (record.http_content_type if record.is_http else record.headers.get("Content-Type")) or ""
            if (
                record.is_http
                and record.http_headers is not None
                and record.http_headers.status_code not in (200, None)
            ):
                continue
            if not kind.startswith(("text/", "application/xhtml")):
                continue
            body = record.reader.read(MAX_RECORD_BYTES + 1)
            if len(body) > MAX_RECORD_BYTES:
                yield place, Bad(f"longer than {MAX_RECORD_BYTES:,} bytes")
            elif "html" in kind:
                yield place, _html_text(body, record.http_charset)
            else:
                yield place, body.decode("utf-8", errors="replace")
    if not number and path.stat().st_size:
        raise BadFileError("holds no record of a page; expected a WARC or WET archive")


def _html_text(body: bytes, charset: str | None) -> str | Bad:
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    from resiliparse.parse.html import HTMLTree

    text = bytes_to_str(body, charset or detect_encoding(body) or "utf-8")
    try:
        tree = HTMLTree.parse(text)
        return extract_plain_text(tree, main_content=True, alt_texts=False)
    except Exception as error:  # the parser's own exceptions have no common class
        return Bad(f"HTML that cannot be parsed ({error})")


def _library(path: Path) -> tuple[Any, Any]:
    try:
        import resiliparse.extract.html2text  # noqa: F401
        from fastwarc.warc import ArchiveIterator, WarcRecordType
    except ImportError:
        raise DataError(f"{path}: reading web archives needs resiliparse: pip install 'minitron[curate]'") from None
    return ArchiveIterator, WarcRecordType
