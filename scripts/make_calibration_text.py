"""Write the bundled calibration text: passages of public-domain books, as JSON lines packed with xz.

    python scripts/make_calibration_text.py books/train.jsonl.xz books/children.jsonl.xz

The books are those of "Classic Books as Markdown" (mlschmitt/classic-books-markdown), all published before 1930: each
line has title, author and text. From every book that is drawn, two passages of whole paragraphs.
"""

from __future__ import annotations

import json
import lzma
import random
import re
import sys
from pathlib import Path

TARGET = Path(__file__).parents[1] / "src" / "minitron" / "assets" / "calibration.jsonl.xz"
BOOKS, PASSAGES, CHARACTERS = 40, 2, 2400


def passage(text: str, draw: random.Random, characters: int = CHARACTERS) -> str:
    """Whole paragraphs from a random place, about `characters` long."""
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text) if len(p.strip()) > 60 and not p.startswith("#")]
    start = draw.randrange(len(paragraphs) // 10, max(len(paragraphs) // 10 + 1, len(paragraphs) - 40))
    found, size = [], 0
    for paragraph in paragraphs[start:]:
        found.append(re.sub(r"\s+", " ", paragraph))
        size += len(paragraph)
        if size >= characters:
            break
    return "\n\n".join(found)[: 2 * characters]


def main() -> None:
    draw = random.Random(0)
    rows = []
    for path in sys.argv[1:]:
        with lzma.open(path, "rt", encoding="utf-8") as file:
            books = [json.loads(line) for line in file]
        for book in draw.sample([book for book in books if len(book["text"]) > 50_000], BOOKS):
            rows += [
                {"title": book["title"], "author": book["author"], "text": passage(book["text"], draw)}
                for _ in range(PASSAGES)
            ]
    draw.shuffle(rows)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    TARGET.write_bytes(lzma.compress(text.encode(), preset=9))
    print(f"{len(rows)} passages, {len(text):,} characters, {TARGET.stat().st_size:,} bytes in {TARGET}")


if __name__ == "__main__":
    main()
