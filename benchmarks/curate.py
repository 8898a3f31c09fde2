"""Speed of the stages of `minitron curate` on the same documents, in megabytes per CPU-second.

    python benchmarks/curate.py books.jsonl.xz --characters 3400 --megabytes 50

Rates are of one process; documents are pieces of the texts of the file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from minitron.curate import quality
from minitron.curate.near import band_keys, near_duplicates
from minitron.curate.recipe import C4, FineWeb, GopherQuality, GopherRepetition, Near
from minitron.curate.texts import Texts
from minitron.curate.word_kernels import grams
from minitron.data.documents import read_documents


def rate(work: Callable[[], object], megabytes: float) -> float:
    """Megabytes per CPU-second, the best of three; the first call, which compiles, does not count."""
    work()
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return megabytes / best


def rules(texts: Texts) -> None:
    counts = quality.measure(texts)
    quality.gopher_repetition(counts, GopherRepetition())
    quality.gopher_quality(counts, GopherQuality())
    changed, _, _ = quality.c4(texts, C4(end_marks=False))
    quality.fineweb(changed, FineWeb())


def deduplicate(texts: Texts) -> None:
    import hashlib

    import numpy as np

    settings = Near()
    view = memoryview(texts.data)
    bounds = texts.offsets.tolist()
    digests = np.frombuffer(
        b"".join(hashlib.blake2b(view[a:b], digest_size=16).digest() for a, b in itertools.pairwise(bounds)),
        dtype=np.uint64,
    ).reshape(-1, 2)
    near_duplicates(
        band_keys(texts, settings), digests, texts.sizes(), np.ones(len(texts), dtype=bool),
        lambda i: grams(Texts.of([texts.raw(i)]), settings.ngram)[0], settings.similarity,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--characters", type=int, default=3400, help="of a document")
    parser.add_argument("--megabytes", type=float, default=20)
    options = parser.parse_args()
    pieces: list[str] = []
    size = 0
    for text in read_documents(options.file):
        for start in range(0, len(text), options.characters):
            if size < options.megabytes * 1e6:
                pieces.append(text[start : start + options.characters])
                size += len(pieces[-1])
    texts = Texts.of(pieces)
    megabytes = len(texts.data) / 1e6
    result = {
        "documents": len(texts),
        "megabytes": megabytes,
        "load": os.getloadavg()[0],
        "gopher, c4 and fineweb rules": rate(lambda: rules(texts), megabytes),
        "exact and near duplicates, 112 permutations": rate(lambda: deduplicate(texts), megabytes),
        "signatures alone": rate(lambda: band_keys(texts, Near()), megabytes),
        "gopher counts alone": rate(lambda: quality.measure(texts), megabytes),
        "c4 alone": rate(lambda: quality.c4(texts, C4(end_marks=False)), megabytes),
        "fineweb alone": rate(lambda: quality.fineweb(texts, FineWeb()), megabytes),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
