"""Make the training text of the bundled model: clean books and stories, cut into documents that fit a block.

In: a folder with `children.jsonl.xz`, `train.jsonl.xz`, `heldout.jsonl.xz` (books: title, author, text in Markdown)
and `storybooks_en.jsonl.gz`, and, if wanted, the file of `make_stories.py`. Out: JSON lines with one field, `text`,
one file a source, so that `minitron train` can weigh them, and held-out files that share no work with them.

    python scripts/bundled_text.py BOOKS_FOLDER OUT_FOLDER [--stories STORIES.jsonl]
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Characters: a block of 512 tokens holds about 1,900 characters of this text.
LONGEST_DOCUMENT = 1700
SHORTEST_DOCUMENT = 120

# Works told in the plainest English; the others of the children's shelf go to "adventure".
EASY_AUTHORS = (
    "Anna Sewell", "Anonymous", "Beatrix Potter", "Carlo Collodi", "Edith Nesbit", "Frances Hodgson Burn",
    "George MacDonald", "Hans Christian Ander", "Hugh Lofting", "J. M. Barrie", "Johanna Spyri", "Kenneth Grahame",
    "L. Frank Baum", "Lewis Carroll", "Louisa May Alcott", "Lucy Maud Montgomery", "Oscar Wilde", "The Brothers Grimm",
)  # fmt: skip
ARCHAIC = (
    "Bulfinch's Mythology", "Robinson Crusoe", "Swiss Family Robinson", "The Merry Adventures of Robin Hood",
    "Hawaiian Folk Tales", "Rip Van Winkle", "The Legend of Sleepy Hollow", "Kidnapped",
    "Christmas Stories from French and Spanish Writers",
)  # fmt: skip
# From the large shelf: later prose in plain words.
PLAIN_BOOKS = (
    "The Boxcar Children", "The Enchanted Barn", "The Girl from Montana", "The Christmas Angel", "The Virginian",
    "The Clue of the Twisted Candle", "Scarhaven Keep", "Gunman's Reckoning", "Cabin Fever", "Parnassus on Wheels",
    "The First Christmas Tree", "A Little Book of Christmas", "Up from Slavery", "The Haunted Bookshop",
    "The Wisdom of Father Brown", "The Mark of Zorro", "King Solomon's Mines", "The Blue Lagoon",
)  # fmt: skip
CREDITS_FILE = "storybook_credits.txt"
HELDOUT_WORKS = ("The Book of Dragons",)

_PLAIN_CHARACTERS = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "\u00a0": " ", "\ufeff": "", "\t": " "}  # noqa: RUF001
)
_HEADING = re.compile(
    r"(chapter|part|book|act|scene|volume|section|letter|canto|illustrations?|contents|the end|finis|(foot)?notes?)\b"
    r".{0,60}$",
    re.IGNORECASE,
)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON lines file, plain or compressed."""
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def clean_paragraphs(text: str) -> list[str]:
    """The prose paragraphs of a Markdown book: no headings, tables, pictures, notes or verse."""
    text = text.translate(_PLAIN_CHARACTERS).replace("\r", "")
    text = re.sub(r"!?\[([^\]\n]*)\]\([^)\n]*\)", r"\1", text)
    text = re.sub(r"\[[^\]]{0,300}\]", "", text)
    out = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.split("\n")
        if lines[0].lstrip().startswith(("#", "|", ">", "***", "---", "* * *", "_ _")) or re.search(r"<\w+", block):
            continue
        short = sum(len(line.strip()) < 28 for line in lines)
        if len(lines) > 2 and (any(line.startswith("    ") for line in lines) or short > 0.6 * len(lines)):
            continue  # verse, lists and letter heads
        paragraph = re.sub(r"\s+", " ", re.sub(r"[*_\\~^`]+", "", " ".join(lines))).strip()
        if is_prose(paragraph):
            out.append(paragraph)
    return out


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph is running English text, not a heading, a table of contents or a foreign passage."""
    if len(paragraph) < 2 or _HEADING.match(paragraph) or not paragraph.isascii():
        return False
    if "http" in paragraph or "Gutenberg" in paragraph:
        return False
    letters = [c for c in paragraph if c.isalpha()]
    if len(letters) < 0.7 * len(paragraph) or sum(c.isupper() for c in letters) > 0.3 * len(letters):
        return False
    return paragraph[-1] in ".!?\"':;,-)"


def cut_documents(paragraphs: list[str], rng: random.Random) -> Iterator[str]:
    """Neighbouring paragraphs joined into documents of varied length, so that they pack into blocks without gaps."""
    document, target = "", rng.randint(500, LONGEST_DOCUMENT)
    for paragraph in paragraphs:
        if document and len(document) + len(paragraph) + 2 > target:
            yield document
            document, target = "", rng.randint(500, LONGEST_DOCUMENT)
        if len(paragraph) > LONGEST_DOCUMENT:
            document = ""
            continue
        document = f"{document}\n\n{paragraph}" if document else paragraph
    if document:
        yield document


def is_good_story(text: str) -> bool:
    """Whether a generated story is plain running text that does not repeat itself."""
    if not (200 <= len(text) <= LONGEST_DOCUMENT) or not text.isascii() or text[-1] not in '.!?"':
        return False
    if re.search(
        r"[*#:_\[\]|<>]|\n\s*(\d+[.)]|-)|\bstor(y|ies) (is|are)\b|[Tt]itle|Here's|I'm sorry, but|As an AI", text
    ):
        return False
    words = re.findall(r"[a-z']+", text.lower())
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(words) > 40 and len(set(triples)) > 0.85 * len(triples)


def book_documents(book: dict[str, Any]) -> list[str]:
    """The documents of one book; the random lengths depend on its title alone."""
    rng = random.Random(book["title"])
    return [d for d in cut_documents(clean_paragraphs(book["text"]), rng) if len(d) >= SHORTEST_DOCUMENT]


def held_out(text: str, share: float = 0.02) -> bool:
    """Whether a document belongs to the held-out slice; decided by its hash, so always the same."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") < share * 2**32


def collect(books: Path, stories: Path | None) -> dict[str, list[str]]:
    """All documents by the name of the file they go to."""
    out: dict[str, list[str]] = {name: [] for name in ("easy", "adventure", "plain_books", "storybooks", "stories")}
    out |= {"heldout_simple": [], "heldout_books": []}
    seen = set()
    for book in read_json_lines(books / "heldout.jsonl.xz"):
        seen.add(book["title"])
        # A tenth is enough for a loss to three digits.
        out["heldout_books"] += [text for text in book_documents(book) if held_out(text, 0.1)]
    for book in read_json_lines(books / "children.jsonl.xz"):
        if book["title"] in seen or book["title"] in ARCHAIC:
            continue
        seen.add(book["title"])
        easy = any(book["author"].startswith(author) for author in EASY_AUTHORS)
        name = "heldout_simple" if book["title"] in HELDOUT_WORKS else "easy" if easy else "adventure"
        out[name] += book_documents(book)
    for book in read_json_lines(books / "train.jsonl.xz"):
        if book["title"] in PLAIN_BOOKS and book["title"] not in seen:
            seen.add(book["title"])
            out["plain_books"] += book_documents(book)
    for story in read_json_lines(books / "storybooks_en.jsonl.gz"):
        text = story["text"].translate(_PLAIN_CHARACTERS)
        text = "\n\n".join(p for line in text.split("\n") if (p := re.sub(r"[*_#]+|\s+", " ", line).strip()))
        if text.isascii() and len(text) >= SHORTEST_DOCUMENT:
            rng = random.Random(story["title"])
            out["heldout_simple" if held_out(text) else "storybooks"] += list(cut_documents(text.split("\n\n"), rng))
    for story in read_json_lines(stories) if stories else ():
        text = story["text"].translate(_PLAIN_CHARACTERS).strip()
        if is_good_story(text):
            out["heldout_simple" if held_out(text) else "stories"].append(text)
    return out


def storybook_credits(books: Path) -> list[str]:
    """Authors and translators of the storybooks, whom their licence (CC-BY) asks to name."""
    rows = list(read_json_lines(books / "storybooks_en.jsonl.gz"))
    named = {" ".join(row[role].split()).rstrip(".") for row in rows for role in ("author", "translation")}
    return sorted(named - {""}, key=str.lower)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("books", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--stories", type=Path, help="output of make_stories.py")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, documents in collect(args.books, args.stories).items():
        with (args.out / f"{name}.jsonl").open("w", encoding="utf-8") as sink:
            sink.writelines(json.dumps({"text": text}) + "\n" for text in documents)
        print(f"{name}: {len(documents)} documents, {sum(map(len, documents)) / 1e6:.2f} MB")
    (args.out / CREDITS_FILE).write_text("\n".join(storybook_credits(args.books)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
