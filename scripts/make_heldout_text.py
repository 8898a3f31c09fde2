"""Write the bundled held-out text: passages of public-domain books that no bundled model was trained on.

    python scripts/make_heldout_text.py books/heldout.jsonl.xz

The books are those of "Classic Books as Markdown" (mlschmitt/classic-books-markdown), all published before 1930, which
`bundled_text.py` and `make_calibration_text.py` leave out. Each line has title, author and text; two passages are taken
from every book.
"""

from __future__ import annotations

import json
import lzma
import random
import sys
from pathlib import Path

from make_calibration_text import passage

TARGET = Path(__file__).parents[1] / "src" / "minitron" / "assets" / "heldout.jsonl.xz"
PASSAGES, CHARACTERS = 2, 1600
LEFT_OUT = {"Surrealist Manifesto"}  # its translation into English may be later than the book


def main() -> None:
    draw = random.Random(0)
    with lzma.open(sys.argv[1], "rt", encoding="utf-8") as file:
        books = [json.loads(line) for line in file]
    rows = [
        {"title": book["title"], "author": book["author"], "text": passage(book["text"], draw, CHARACTERS)}
        for book in books
        if book["title"] not in LEFT_OUT
        for _ in range(PASSAGES)
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    TARGET.write_bytes(lzma.compress(text.encode(), preset=9))
    print(f"{len(rows)} passages, {len(text):,} characters, {TARGET.stat().st_size:,} bytes in {TARGET}")


if __name__ == "__main__":
    main()
