"""Personal data against a labelled set of real forms and of look-alikes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from minitron.curate.personal import luhn, replacer
from minitron.curate.recipe import PersonalData, recipe_from
from minitron.curate.run import curate

FOUND = {
    "EMAIL": ["jane.doe@example.com", "a+b@sub.domain.co.uk", "o'neil_77@mail-server.org", "x@y.io"],
    "IP": ["8.8.8.8", "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946", "2001:4860:4860::8888"],
    "PHONE": [
        "+1 650 253 0000",
        "+44 20 7946 0958",
        "+49-30-901820",
        "(212) 555-0123",
        "415-555-2671",
        "+33 (1) 42 68 53 00",
    ],
    "CARD": ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", "6011111111111117"],
    "KEY": [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "a1B2" * 9,
        "sk-" + "abcDEF123456" * 4,
        "xoxb-123456789012-abcdefGHIJKL",
        "AIza" + "Sy0_-" * 7,
        "hf_" + "AbCdEfGh12" * 3,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dBjftJeZ4CVPmB92K27uhbUJU1p1r",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nabc==\n-----END RSA PRIVATE KEY-----",
    ],
}
KEPT = [
    "@home", "follow me @jane", "a @ b", "user@localhost", "10.0.0.1", "192.168.1.20", "127.0.0.1",
    "256.1.1.1", "1.2.3", "section 1.2.3.4.5", "v1.2.3.4x", "12:30:45", "::1", "std::vector", "fe80::1",
    "2001-2010", "1914-1918", "1,234,567.89", "4111 1111 1111 1112", "978-3-16-148410-0", "3.14159265358979",
    "12345", "2026-11-28", "100-200-3000 copies", "+5", "+ 1 2 3", "task-force", "sk-learn",
    "risk-free-investment", "eyJ", "the key is under the mat", "0123456789", "GH_PAGES",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
@pytest.mark.parametrize("around", ["{}", "Call or write: {}.", "({}), please", "\u4f60\u597d {} \u4f60"])
def test_it_is_replaced_and_counted(kind: str, text: str, around: str) -> None:
    counts: Counter[str] = Counter()
    assert replacer(PersonalData())(around.format(text), counts) == around.format(f"<{kind}>")
    assert counts == {kind: 1}


@pytest.mark.parametrize("text", KEPT)
def test_look_alikes_stay(text: str) -> None:
    counts: Counter[str] = Counter()
    assert replacer(PersonalData())(f"See {text} here.", counts) == f"See {text} here."
    assert not counts


def test_a_kind_that_is_off_stays() -> None:
    text = "jane.doe@example.com and 8.8.8.8"
    assert replacer(PersonalData(emails=False))(text, Counter()) == "jane.doe@example.com and <IP>"


def test_luhn_accepts_one_check_digit_of_ten() -> None:
    assert [luhn(f"7992739871{digit}") for digit in range(10)] == [digit == 3 for digit in range(10)]


def test_a_run_counts_and_logs_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    secret = "jane.doe@example.com"
    texts = [f"Write to {secret} or {secret}.", "nothing here"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    recipe = recipe_from(
        {"personal_data": {}, "gopher_quality": {"min_words": 3, "min_stop_words": 1}, "output": {"format": "jsonl"}}
    )
    report = curate([str(path)], tmp_path / "out", recipe)
    assert report.stages["personal_data"].replaced == {"EMAIL": 2}
    for written in (tmp_path / "out").rglob("*.json*"):
        assert secret not in written.read_text(), written
    assert "<EMAIL>" in (tmp_path / "out" / "shards" / "000000.jsonl").read_text()
