"""Run the programs of the tutorials and write their outputs below them.

    python scripts/tutorials.py [--check] [NAME...]

Each page is one program. The text block right after a Python block is what that block prints. `--check` writes nothing
and fails if an output differs; numbers with a point may differ by 2 in their last digits between processors
(`same_output`).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
_BLOCK = re.compile(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TOLERANCE = 0.05
"""Relative: processors round the products of bf16 differently."""


def run(page: str) -> str:
    """The page with the outputs that its programs print now."""
    names: dict[str, object] = {"__name__": "__main__"}

    def execute(match: re.Match[str]) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(match[1], "tutorial", "exec"), names)
        return f"```python\n{match[1]}```\n\n```text\n{printed.getvalue()}```"

    return _BLOCK.sub(execute, page)


def same_output(before: str, after: str) -> bool:
    """Whether two pages have the same words and numbers; those with a point or a % within `TOLERANCE`."""
    number = re.compile(r"\d+\.\d+|\d+%")
    if number.sub("#", before) != number.sub("#", after):
        return False
    pairs = zip(number.findall(before), number.findall(after), strict=True)
    values = ((float(a.rstrip("%")), float(b.rstrip("%"))) for a, b in pairs)
    return all(abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) + 0.011 for a, b in values)


def main() -> int:
    """Write the outputs, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="pages; all if none is named")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if an output differs")
    given = parser.parse_args()
    different = []
    for path in sorted(FOLDER.glob("*.md")):
        if given.names and path.stem not in given.names:
            continue
        before = path.read_text(encoding="utf-8")
        after = run(before)
        if given.check and not same_output(before, after):
            different.append(path.name)
        elif not given.check:
            path.write_text(after, encoding="utf-8")
    if different:
        print(f"other outputs: {', '.join(different)}; run python scripts/tutorials.py")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
