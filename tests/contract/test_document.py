"""docs/contract.md names every row, and only tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ROWS = [
    *(f"D{i}" for i in range(1, 19)),
    *(f"C{i}" for i in range(1, 11)),
    *(f"M{i}" for i in range(1, 14)),
    *(f"L{i}" for i in range(1, 9)),
    *(f"S{i}" for i in range(1, 7)),
    *(f"Q{i}" for i in range(1, 6)),
    *(f"T{i}" for i in range(1, 6)),
]


def test_every_row_has_a_test_and_every_test_named_exists() -> None:
    lines = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8").splitlines()
    rows = {line.split("|")[1].strip(): line for line in lines if re.match(r"\| [A-Z]\d+ \|", line)}
    assert list(rows) == ROWS
    tests = {name for file in HERE.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)}
    for row, line in rows.items():
        named = re.findall(r"`(test_\w+)`", line)
        assert named, row
        for name in named:
            assert name in tests, name
            assert row in name.split("_"), f"{name} in row {row}"
