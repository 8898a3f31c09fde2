"""Speed of the filters of datatrove and NeMo Curator, for a Python that has them and numba: their rules beside ours.

    python benchmarks/curate_others.py documents.jsonl --megabytes 1

Megabytes per CPU-second of one process: the rules of Gopher, C4 and FineWeb by datatrove, of Gopher by Curator, ours on
the same documents. Words are what white space separates, for datatrove as well, which would ask spaCy and take longer.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curate import rules  # of this folder

from minitron.curate.texts import Texts

_SENTENCE_END = re.compile(r"(?<=[.?!\u2026])\s+")


def cpu_rate(work: Callable[[], object], megabytes: float) -> float:
    """Megabytes per CPU-second of one call."""
    start = time.process_time()
    work()
    return megabytes / (time.process_time() - start)


def by_datatrove(texts: list[str]) -> None:
    """Four filters."""
    from datatrove.data import Document  # type: ignore[reportMissingImports]
    from datatrove.pipeline import filters  # type: ignore[reportMissingImports]
    from datatrove.pipeline.filters import (  # type: ignore[reportMissingImports]
        c4_filters,
        fineweb_quality_filter,
        gopher_quality_filter,
        gopher_repetition_filter,
    )

    for module in (fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter):
        module.split_into_words = lambda text, *_: text.split()
    c4_filters.split_into_sentences = lambda text, *_: _SENTENCE_END.split(text)
    chosen = [
        filters.GopherRepetitionFilter(),
        filters.GopherQualityFilter(),
        filters.C4QualityFilter(filter_no_terminal_punct=False),
        filters.FineWebQualityFilter(),
    ]
    for text in texts:
        for each in chosen:
            each.filter(Document(text=text, id=""))


def by_curator(texts: list[str]) -> None:
    """The filters of its heuristic rules that Gopher's correspond to."""
    from nemo_curator.stages.text.filters.heuristic import repetition, string  # type: ignore[reportMissingImports]

    chosen: list[Any] = [
        *(string.WordCountFilter(), string.MeanWordLengthFilter(), string.SymbolsToWordsFilter()),
        *(string.BulletsFilter(), string.EllipsisFilter(), string.WordsWithoutAlphabetsFilter()),
        string.CommonEnglishWordsFilter(),
        *(repetition.RepeatedLinesFilter(), repetition.RepeatedParagraphsFilter()),
        *(repetition.RepeatedLinesByCharFilter(), repetition.RepeatedParagraphsByCharFilter()),
        *(repetition.RepeatingTopNGramsFilter(n=n) for n in (2, 3, 4)),
        *(repetition.RepeatingDuplicateNGramsFilter(n=n) for n in (5, 6, 7, 8, 9, 10)),
    ]
    for text in texts:
        for each in chosen:
            each.keep_document(each.score_document(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines with a field text")
    parser.add_argument("--megabytes", type=float, default=1.0)
    options = parser.parse_args()
    texts: list[str] = []
    size = 0
    with options.file.open(encoding="utf-8") as file:
        for line in file:
            texts.append(json.loads(line)["text"])
            size += len(texts[-1].encode())
            if size >= options.megabytes * 1e6:
                break
    packed = Texts.of(texts)
    rules(packed)  # compiles
    by_datatrove(texts[:2])
    by_curator(texts[:2])
    rates = {
        "minitron": cpu_rate(lambda: [rules(packed) for _ in range(5)], 5 * size / 1e6),
        "datatrove": cpu_rate(lambda: by_datatrove(texts), size / 1e6),
        "curator": cpu_rate(lambda: by_curator(texts), size / 1e6),
    }
    rates["over datatrove"] = rates["minitron"] / rates["datatrove"]
    rates["over curator"] = rates["minitron"] / rates["curator"]
    print(json.dumps({"documents": len(texts), "megabytes": size / 1e6, **rates}, indent=1))


if __name__ == "__main__":
    main()
