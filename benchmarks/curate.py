"""Speed of `minitron curate` on the same documents: its stages, whole runs, and the memory for each document.

    python benchmarks/curate.py books.jsonl.xz --characters 3400 --megabytes 50
    python benchmarks/curate.py books.jsonl.xz --whole --evaluations datasets

Rates are megabytes per CPU-second of one process; documents are pieces of the texts of the file. `--whole` measures
runs with boilerplate, personal data, language, FineWeb's rules, near duplicates and, if `--evaluations` names the
folder of the tasks, decontamination by five of them: with one worker and two, CPU and wall seconds, peak memory. For
more megabytes than the file has, each document of `--whole` is made of paragraphs that are drawn at random from it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from minitron.curate import quality
from minitron.curate.exact import first_of_equal
from minitron.curate.near import band_keys, near_duplicates
from minitron.curate.recipe import C4, FineWeb, GopherQuality, GopherRepetition, Near
from minitron.curate.texts import Texts
from minitron.curate.word_kernels import grams
from minitron.data.documents import read_documents

TASKS = ("mmlu", "hellaswag", "winogrande", "arc_challenge", "gsm8k")
FILES = 8
"""That the documents of a whole run are in."""


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


def bytes_per_document(documents: int) -> float:
    """Peak memory of the comparison of many short texts, all of its arrays included, for each of them."""
    import tracemalloc

    import numpy as np

    settings = Near()
    rng = np.random.default_rng(0)
    tracemalloc.start()
    keys = rng.integers(0, 1 << 63, (documents, settings.bands), dtype=np.uint64)
    digests = rng.integers(0, 1 << 63, (documents, 2), dtype=np.uint64)
    sizes = rng.integers(1, 10_000, documents)
    kept = first_of_equal(digests)
    near_duplicates(keys, digests, sizes, kept, lambda i: np.zeros(0, dtype=np.uint64), settings.similarity)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak / documents


def pieces_of(options: argparse.Namespace) -> Iterator[str]:
    """Pieces of the texts of the file, up to the size that is wanted or to its end."""
    size = 0
    for text in read_documents(options.file):
        for start in range(0, len(text), options.characters):
            if size >= options.megabytes * 1e6:
                return
            yield text[start : start + options.characters]
            size += len(text[start : start + options.characters])


def drawn_documents(options: argparse.Namespace) -> Iterator[str]:
    """Documents of paragraphs that are drawn at random from the whole file."""
    paragraphs = [part for text in read_documents(options.file) for part in text.split("\n\n") if len(part) > 80]
    rng = random.Random(0)
    size = 0
    while size < options.megabytes * 1e6:
        parts: list[str] = []
        while sum(map(len, parts)) < options.characters:
            parts.append(rng.choice(paragraphs))
        yield "\n\n".join(parts)
        size += sum(map(len, parts))


def write_texts(texts: Iterable[str], folder: Path) -> tuple[int, int]:
    """Write texts to `FILES` files in turn; how many texts and bytes."""
    folder.mkdir()
    count = size = 0
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context((folder / f"{number}.jsonl").open("w")) for number in range(FILES)]
        for count, text in enumerate(texts, 1):
            files[count % FILES].write(json.dumps({"text": text}) + "\n")
            size += len(text.encode())
    return count, size


def whole(options: argparse.Namespace) -> dict[str, Any]:
    """Runs of `minitron curate` with one worker and with two, by what the system says of their processes.

    The start of the first process, with the loading of kernels and models, is measured by a run of a few documents, and
    subtracted. That of two workers is not: the few documents are one part, which the first process reads itself.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        folder = Path(name)
        recipe = folder / "recipe.yaml"
        data = options.evaluations
        tasks = f"decontaminate: {{tasks: [{', '.join(TASKS)}], data: {data}}}\n" if data else ""
        repair = str(options.repair).lower()
        recipe.write_text(f"preset: fineweb\nnormalize: {{repair: {repair}}}\nboilerplate: {{}}\n"
                          f"personal_data: {{}}\nlanguage: {{}}\n{tasks}", encoding="utf-8")  # fmt: skip
        count, size = write_texts(pieces_of(options), folder / "all")
        kind = "pieces of the file"
        if size < options.megabytes * 0.9e6:
            shutil.rmtree(folder / "all")
            count, size = write_texts(drawn_documents(options), folder / "all")
            kind = "paragraphs drawn at random"
        write_texts(itertools.islice(pieces_of(options), 40), folder / "few")
        run_once(folder / "few", folder / "few-0", recipe, 1)  # compiles the kernels, if that was not done before
        for workers in (1, 2):
            start = run_once(folder / "few", folder / f"few-{workers}", recipe, workers)
            made = run_once(folder / "all", folder / f"all-{workers}", recipe, workers)
            shutil.rmtree(folder / f"all-{workers}")
            cpu, wall = made["cpu"] - start["cpu"], made["wall"] - start["wall"]
            found[f"{workers} workers" if workers > 1 else "1 worker"] = {
                "MB per CPU-second": size / 1e6 / cpu, "MB per second": size / 1e6 / wall, "CPU seconds": cpu,
                "wall seconds": wall, "seconds of the start": start["wall"],
                "peak GB of a process": made["memory"] / 1e9,
            }  # fmt: skip
    one, two = found["1 worker"], found["2 workers"]
    ratio = one["wall seconds"] / two["wall seconds"]
    return {"documents": count, "megabytes": size / 1e6, "made of": kind, **found, "two workers against one": ratio}


def run_once(source: Path, out: Path, recipe: Path, workers: int) -> dict[str, float]:
    """CPU and wall seconds of a run, and the memory of its largest process in bytes."""
    command = ["curate", str(source), "-o", str(out), "--recipe", str(recipe), "--workers", str(workers), "--quiet"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "minitron", *command], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "wall": time.perf_counter() - start, "memory": 1024.0 * after.ru_maxrss}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--characters", type=int, default=3400, help="of a document")
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--whole", action="store_true", help="measure whole runs instead of stages")
    parser.add_argument("--repair", action="store_true", help="with ftfy in the whole runs")
    parser.add_argument("--evaluations", help="folder of the tasks of `minitron eval`")
    parser.add_argument("--scratch", help="folder for the texts and shards of whole runs")
    parser.add_argument("--documents", type=int, default=500_000, help="of the measurement of memory")
    options = parser.parse_args()
    if options.whole:
        print(json.dumps({"load": os.getloadavg()[0], **whole(options)}, indent=1))
        return
    texts = Texts.of(list(pieces_of(options)))
    megabytes = len(texts.data) / 1e6
    result = {
        "documents": len(texts),
        "megabytes": megabytes,
        "load": os.getloadavg()[0],
        "gopher, c4 and fineweb rules": rate(lambda: rules(texts), megabytes),
        "exact and near duplicates, 112 permutations": rate(lambda: deduplicate(texts), megabytes),
        "bytes of memory for each document": bytes_per_document(options.documents),
        "signatures alone": rate(lambda: band_keys(texts, Near()), megabytes),
        "gopher counts alone": rate(lambda: quality.measure(texts), megabytes),
        "c4 alone": rate(lambda: quality.c4(texts, C4(end_marks=False)), megabytes),
        "fineweb alone": rate(lambda: quality.fineweb(texts, FineWeb()), megabytes),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
