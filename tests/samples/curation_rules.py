"""The published quality rules, written out in plain Python: slow, and independent of the kernels."""

from __future__ import annotations

import re
from collections import Counter

STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
TOP = ((2, 0.2), (3, 0.18), (4, 0.16))
DUPLICATE = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))


def repeated(pieces: list[str]) -> tuple[int, int]:
    """(repeated pieces, their characters)."""
    seen: set[str] = set()
    count = size = 0
    for piece in pieces:
        if piece in seen:
            count, size = count + 1, size + len(piece)
        seen.add(piece)
    return count, size


def top_characters(words: list[str], n: int) -> int:
    grams = [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]
    gram, count = Counter(grams).most_common(1)[0]
    return len(gram) * count


def duplicate_characters(words: list[str], n: int) -> int:
    seen: set[str] = set()
    size = i = 0
    while i <= len(words) - n:
        gram = "".join(words[i : i + n])
        if gram in seen:
            size, i = size + len(gram), i + n
        else:
            seen.add(gram)
            i += 1
    return size


def gopher_counts(text: str, punctuation: set[str]) -> dict[str, int]:
    """The counts of `gopher_kernels.COLUMNS`."""
    words = text.split()
    real = [w for w in words if any(c not in punctuation for c in w)]
    lines = text.splitlines()
    paragraphs, rows = re.split(r"\n{2,}", text.strip()), re.split(r"\n+", text)
    counts = {
        "characters": len(text),
        "words": len(words),
        "real_words": len(real),
        "real_word_characters": sum(map(len, real)),
        "alpha_words": sum(any(c.isalpha() for c in w) for w in words),
        "stop_words": len(STOP_WORDS & set(words)),
        "hashes": text.count("#"),
        "ellipses": text.count("...") + text.count("\u2026"),
        "lines": len(lines),
        "bullet_lines": sum(s.lstrip().startswith(("\u2022", "-")) for s in lines),
        "ellipsis_lines": sum(s.rstrip().endswith(("...", "\u2026")) for s in lines),
        "paragraphs": len(paragraphs),
        "rows": len(rows),
    }
    counts["duplicate_paragraphs"], counts["duplicate_paragraph_characters"] = repeated(paragraphs)
    counts["duplicate_rows"], counts["duplicate_row_characters"] = repeated(rows)
    for n, _ in TOP:
        counts[f"top_{n}"] = top_characters(words, n) if len(words) >= n else 0
        counts[f"top_{n}_grams"] = max(0, len(words) - n + 1)
    for n, _ in DUPLICATE:
        counts[f"duplicate_{n}"] = duplicate_characters(words, n)
    return counts


def sentences(line: str) -> int:
    """How many sentences a line has, by the rule of `line_kernels`."""
    return 1 + len(re.findall(r"""[.?!\u2026][.?!\u2026"')\]\u2019\u201d]*\s+(?=\S)""", line))


_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


def c4(text: str, end_marks: bool = True) -> str | tuple[str]:
    """The text after C4's line rules, or (why the text is removed,)."""
    kept, count = [], 0
    for line in text.splitlines():
        line = line.strip()
        words = line.split()
        if any(len(word) > 1000 for word in words):
            continue
        line = _CITATION.sub("", line)
        if end_marks and (not line.endswith((".", "?", "!", '"', "'")) or line.endswith("...")):
            continue
        if len(words) < 3:
            continue
        small = line.lower()
        if "lorem ipsum" in small:
            return ("lorem ipsum",)
        if "javascript" in small:
            continue
        if "{" in line:
            return ("curly bracket",)
        if any(policy in small for policy in _POLICIES):
            continue
        count += sentences(line)
        kept.append(line)
    return "\n".join(kept).strip() if count >= 5 else ("few sentences",)


def fineweb_counts(text: str, terminal: tuple[str, ...]) -> dict[str, int]:
    """The counts of `line_kernels.FINEWEB_COLUMNS`."""
    rows = [row for row in text.split("\n") if row.strip()]
    return {
        "rows": len(rows),
        "rows_with_end_mark": sum(row.endswith(terminal) for row in rows),
        "short_rows": sum(len(row) <= 30 for row in rows),
        "duplicate_characters": repeated(rows)[1],
        "characters": len(text.replace("\n", "")),
        "line_feeds": text.count("\n"),
        "words": len(text.split()),
    }
