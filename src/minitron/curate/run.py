"""A curation from input files to shards: parts through the stages, then what all parts must know, then the shards.

The folder holds all state. A part or a shard is complete when its file is there; whatever ended the run, the same
command continues it, and the shards are the same bits as without the interruption.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from ..files import TargetError, is_empty, locked, require_apart, require_folder_name, write_text
from ..version import __version__
from .across import AllParts
from .decontaminate import evaluations_digest
from .exact import first_of_equal
from .near import near_duplicates
from .part import process_part, read_record
from .quality import Mask
from .reading import input_files, plan_parts
from .recipe import Recipe
from .report import REPORT, Report, read_report, write_report
from .shards import write_shard
from .stages import stages_of
from .tally import MOST_EXAMPLES, StageTally

STATE = "curate.json"
WORK = "work"
SHARDS = "shards"


class CurationError(ValueError):
    """Input or a folder that cannot be curated; the message says why and what would be right."""


def curate(
    inputs: Iterable[str], out: Path, recipe: Recipe, *, workers: int = 1, say: Callable[[str], None] = lambda _: None
) -> Report:
    """Curate texts into `out/shards`, with `out/report.json`.

    Args:
        inputs: files, folders or patterns.
        out: a new folder, or that of an interrupted run with the same recipe and inputs, which is continued.
        workers: processes; the shards do not depend on it.
        say: gets sentences about the progress.

    Raises:
        CurationError: the folder is of another run, too many documents are bad, or none is left.
        FileNotFoundError, DataError: see `reading.input_files`.
        TargetError, LockedError, WriteError: see `files`.
    """
    names = list(inputs)
    require_folder_name(out)
    files = input_files(names, recipe)
    require_apart(out, [*map(Path, names), *files])
    if workers < 1:
        raise CurationError(f"workers is {workers}; it must be at least 1")
    start = time.perf_counter()
    with locked(out):
        _claim(out, recipe, files)
        if (out / REPORT).exists():
            say(f"{out}: is complete already")
            return read_report(out)
        stages_of(recipe)  # a library or an evaluation that is missing is refused before any work is done
        parts = plan_parts(files, recipe.encoding)
        work = out / WORK
        work.mkdir(exist_ok=True)
        total = sum(path.stat().st_size for path in files)
        say(f"{len(files):,} files, {total / 1e6:,.1f} MB, in {len(parts):,} parts")
        numbers = range(len(parts))
        for done in _each(process_part, [(parts[i], i, recipe, work) for i in numbers], workers):
            say(f"part {done} of {len(parts)}")
        report = _merged(work, len(parts))
        _require_good(report, recipe)
        kept = _across(work, len(parts), recipe, report)
        shards = [(work, i, kept[i], out / SHARDS, recipe.output.format) for i in numbers if kept[i].any()]
        for _ in _each(write_shard, shards, workers):
            pass
        report.finish(recipe, [str(path) for path in files], time.perf_counter() - start, workers)
        write_report(report, out)
        shutil.rmtree(work)
    if not report.documents_out:
        raise CurationError(
            f"{out}: no document is left; removed were: {report.reasons() or 'none, the input is empty'}"
        )
    return report


def _claim(out: Path, recipe: Recipe, files: list[Path]) -> None:
    """Begin a folder, or refuse one that is not of this run."""
    mine = {
        "version": __version__,
        "recipe": json.loads(json.dumps(recipe.as_dict())),
        "inputs": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "evaluations": None if recipe.decontaminate is None else evaluations_digest(recipe.decontaminate),
    }
    state = out / STATE
    if not state.exists():
        if not is_empty(out):
            raise TargetError(f"{out}: is not empty and holds no {STATE}; choose a new folder")
        write_text(state, json.dumps(mine, indent=1, ensure_ascii=False))
        return
    try:
        theirs = json.loads(state.read_text(encoding="utf-8"))
        before = theirs["recipe"]
    except (ValueError, KeyError, TypeError):
        raise CurationError(f"{state}: not the state of a curation; choose a new folder") from None
    for name, value in mine["recipe"].items():
        if before.get(name) != value:
            raise CurationError(f"{out}: was begun with {name}: {before.get(name)}, not {value}; choose a new folder")
    for name, what in (
        ("inputs", "other input files, or they changed since"),
        ("evaluations", "other texts of the evaluations that decontaminate names; their files changed since"),
        ("version", "another version"),
    ):
        if theirs.get(name) != mine[name]:
            raise CurationError(f"{out}: was begun with {what}; choose a new folder")


def _each(work: Callable[..., None], calls: list[tuple[Any, ...]], workers: int) -> Iterator[int]:
    """Make all calls, in processes if there are several workers; how many are done, after each."""
    if workers == 1 or len(calls) < 2:
        for done, call in enumerate(calls, 1):
            work(*call)
            yield done
        return
    context = multiprocessing.get_context("spawn")  # threads of pyarrow do not survive a fork
    with ProcessPoolExecutor(min(workers, len(calls)), mp_context=context) as pool:
        try:
            for done, _ in enumerate(pool.map(work, *zip(*calls, strict=True)), 1):
                yield done
        except BrokenProcessPool:
            raise CurationError(
                "a worker process was ended, perhaps for want of memory; the same command with fewer workers continues"
            ) from None


def _merged(work: Path, parts: int) -> Report:
    """The records of all parts as one."""
    report = Report()
    for number in range(parts):
        record = read_record(work, number)
        report.add_bad(record["bad"])
        for name, values in record["stages"].items():
            report.stages.setdefault(name, StageTally()).merge(StageTally.from_dict(values))
    return report


def _require_good(report: Report, recipe: Recipe) -> None:
    good = report.stages["read"].documents_out if report.stages else 0
    if report.bad > recipe.max_bad * (report.bad + good):
        raise CurationError(
            f"{report.bad:,} of {report.bad + good:,} documents cannot be used, more than max_bad, {recipe.max_bad:g}: "
            + "; ".join(report.bad_named[:5])
        )


def _across(work: Path, parts: int, recipe: Recipe, report: Report) -> list[Mask]:
    """Which documents of each part stay, by the stages that compare all documents."""
    every = AllParts(work, parts)
    kept = np.ones(len(every), dtype=bool)
    if recipe.exact is not None and recipe.exact.documents:
        start = time.process_time()
        kept = first_of_equal(every.digests)
        tally = every.tally(np.ones(len(every), dtype=bool), kept, "equal to another document")
        tally.cpu_seconds = time.process_time() - start
        report.stages["exact"] = tally
    if recipe.near is not None:
        start = time.process_time()
        removed = near_duplicates(
            every.keys(), every.digests, every.sizes, kept, every.gram_reader(recipe.near.ngram), recipe.near.similarity
        )
        after = kept.copy()
        after[list(removed)] = False
        tally = every.tally(kept, after, "similar to a longer document")
        for text, (other, similarity) in sorted(removed.items())[:MOST_EXAMPLES]:
            source, place, beginning = every.document(text)
            like, where, _ = every.document(other)
            tally.example(
                "similar to a longer document", source, place,
                f"[Jaccard {similarity:.3f} with {like}{', ' if where else ''}{where}] {beginning}",
            )  # fmt: skip
        seconds = sum(read_record(work, number)["near_seconds"] for number in range(parts))
        tally.cpu_seconds = seconds + time.process_time() - start
        report.stages["near"] = tally
        kept = after
    return [kept[a:b] for a, b in itertools.pairwise(every.starts)]
