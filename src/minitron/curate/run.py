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

from ..files import TargetError, is_empty, locked, new_file, require_apart, require_folder_name, write_text
from ..version import __version__
from .across import AllParts
from .compare import compare
from .decontaminate import evaluations_now, read_evaluations
from .estimate import Estimate, estimate
from .mixing import copies_of, repeated, shards_of, shuffled
from .page import PAGE, write_page
from .part import array_path, compares_pieces, drop_pieces, process_part, read_record
from .pieces import repeated_pieces
from .quality import Mask
from .reading import input_files, plan_parts
from .recipe import Recipe
from .report import REPORT, Report, read_report, write_report
from .shards import write_shard, write_shuffled
from .stages import stages_of
from .tally import StageTally

STATE = "curate.json"
WORK = "work"
SHARDS = "shards"


Each = Callable[[Callable[..., None], list[tuple[Any, ...]], int], Iterator[int]]
"""Makes all calls of a function with a number of workers; yields how many are done, after each."""


class CurationError(ValueError):
    """Input or a folder that cannot be curated; the message says why and what would be right."""


def curate(
    inputs: Iterable[str],
    out: Path,
    recipe: Recipe,
    *,
    workers: int = 1,
    say: Callable[[str], None] = lambda _: None,
    each: Each | None = None,
) -> Report:
    """Curate texts into `out/shards`, with `out/report.json` and `out/report.html`.

    Args:
        inputs: files, folders or patterns.
        out: a new folder, or that of an interrupted run with the same recipe and inputs, which is continued.
        workers: processes; the shards do not depend on it.
        say: gets sentences about the progress.
        each: makes the calls of a step; by default in processes of this machine, see `ray_calls` for a cluster.

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
            report = read_report(out)
        else:
            report = _run(files, out, recipe, workers, say, each or in_processes, start)
    if not report.documents_out:
        raise CurationError(
            f"{out}: no document is left; removed were: {report.reasons() or 'none, the input is empty'}"
        )
    return report


def _run(
    files: list[Path], out: Path, recipe: Recipe, workers: int, say: Callable[[str], None], each: Each, start: float
) -> Report:
    """A run from its beginning, or from where it was interrupted, to its report."""
    stages_of(recipe)  # a library or an evaluation that is missing is refused before any work is done
    expected = estimate(files, recipe, workers)
    say(expected.sentence())
    if shutil.disk_usage(out).free < expected.disk_bytes:
        say(f"{out}: {shutil.disk_usage(out).free / 1e9:.1f} GB are free on this disk, which may not be enough")
    report = _stages_and_shards(files, out, recipe, workers, say, each)
    report.startup_seconds += expected.startup_seconds
    report.finish(recipe, [str(path) for path in files], time.perf_counter() - start, workers, expected.as_dict())
    write_page(report, out / PAGE)
    write_report(report, out)
    shutil.rmtree(out / WORK)
    return report


def plan(inputs: Iterable[str], recipe: Recipe, workers: int = 1) -> Estimate:
    """What a curation would take: documents, time, memory and disk. Nothing is written.

    Raises:
        FileNotFoundError, DataError: see `reading.input_files`.
        ValueError: a library or an evaluation is missing.
    """
    stages_of(recipe)
    return estimate(input_files(list(inputs), recipe), recipe, workers)


def _stages_and_shards(
    files: list[Path], out: Path, recipe: Recipe, workers: int, say: Callable[[str], None], each: Each
) -> Report:
    """All work: parts, what compares all documents, shards."""
    parts = plan_parts(files, recipe.encoding)
    work = out / WORK
    work.mkdir(exist_ok=True)
    if recipe.decontaminate is not None:
        read_evaluations(recipe.decontaminate).save(work)
    total = sum(path.stat().st_size for path in files)
    say(f"{len(files):,} files, {total / 1e6:,.1f} MB, in {len(parts):,} parts")
    for done in each(process_part, [(part, i, recipe, work) for i, part in enumerate(parts)], workers):
        say(f"part {done} of {len(parts)}")
    report = _merged(work, len(parts))
    _require_good(report, recipe)
    if compares_pieces(recipe):
        report.stages["exact_pieces"] = _without_pieces(work, len(parts), recipe, workers, each)
    every = AllParts(work, len(parts))
    kept = compare(every, work, len(parts), recipe, report)
    copies = _copies(every, kept, recipe, report)
    report.add_after(every, copies, recipe)
    _write_shards(work, every, copies, recipe, out / SHARDS, workers, each)
    return report


def _without_pieces(work: Path, parts: int, recipe: Recipe, workers: int, each: Each) -> StageTally:
    """Drop the paragraphs and lines that came before from all parts."""
    cpu, wall = time.process_time(), time.perf_counter()
    paths = [path for i in range(parts) if (path := array_path(work, i, "pieces")).exists()]
    starts, calls = 0, []
    for number in range(parts):
        path = array_path(work, number, "pieces")
        if path in paths:
            calls.append((number, starts, recipe, work))
            starts += len(np.load(path, mmap_mode="r"))
    repeated_hashes, firsts = repeated_pieces(paths)
    for name, values in (("repeated", repeated_hashes), ("firsts", firsts)):
        with new_file(work / f"{name}.npy", overwrite=True) as draft, draft.open("wb") as file:
            np.save(file, values)
    tally = StageTally(cpu_seconds=time.process_time() - cpu, wall_seconds=time.perf_counter() - wall)
    for _ in each(drop_pieces, calls, workers):
        pass
    for number, *_ in calls:
        tally.merge(StageTally.from_dict(read_record(work, number, "pieces")["stage"]))
        seconds = read_record(work, number)["pieces_seconds"]
        tally.cpu_seconds, tally.wall_seconds = tally.cpu_seconds + seconds, tally.wall_seconds + seconds
    return tally


def _copies(every: AllParts, kept: Mask, recipe: Recipe, report: Report) -> Any:
    """(documents,) int64: how often each document is written."""
    if recipe.mix is None:
        return kept.astype(np.int64)
    cpu, wall = time.process_time(), time.perf_counter()
    copies = np.where(kept, copies_of(every.digests, every.column("source"), recipe.mix), 0)
    tally = every.tally(kept, kept & (copies > 0), "not chosen by its weight")
    tally.documents_out = int(copies.sum())
    tally.bytes_out, tally.tokens_out = int((copies * every.sizes).sum()), int((copies * every.tokens).sum())
    tally.cpu_seconds, tally.wall_seconds = time.process_time() - cpu, time.perf_counter() - wall
    report.stages["mix"] = tally
    return copies


def _write_shards(
    work: Path, every: AllParts, copies: Any, recipe: Recipe, folder: Path, workers: int, each: Each
) -> None:
    columns = [
        name
        for part, names in (
            (recipe.language, ["language", "language_score"]),
            (recipe.quality_score, ["quality_score"]),
            (recipe.tokens, ["tokens"]),
        )
        for name in names
        if part is not None
    ]
    kind = recipe.output.format
    if recipe.shuffle is None:
        calls: list[tuple[Any, ...]] = []
        for number, (first, last) in enumerate(itertools.pairwise(every.starts)):
            rows, numbers = repeated(copies[first:last])
            if len(rows):
                calls.append((work, number, rows, numbers, columns, folder, kind))
        for _ in each(write_shard, calls, workers):
            pass
        return
    documents, numbers = shuffled(every.digests, copies, recipe.shuffle.seed)
    ranges = shards_of(every.sizes[documents], recipe.shuffle.shard_bytes)
    calls = [
        (work, every.starts[:-1], number, documents[a:b], numbers[a:b], columns, folder, kind)
        for number, (a, b) in enumerate(ranges)
    ]
    for _ in each(write_shuffled, calls, workers):
        pass


def _claim(out: Path, recipe: Recipe, files: list[Path]) -> None:
    """Begin a folder, or refuse one that is not of this run."""
    mine = {
        "version": __version__,
        "recipe": json.loads(json.dumps(recipe.as_dict())),
        "inputs": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "evaluations": None if recipe.decontaminate is None else evaluations_now(recipe.decontaminate).digest(),
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


def in_processes(work: Callable[..., None], calls: list[tuple[Any, ...]], workers: int) -> Iterator[int]:
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
        report.add_part(read_record(work, number))
    return report


def _require_good(report: Report, recipe: Recipe) -> None:
    good = report.stages["read"].documents_out if report.stages else 0
    if report.bad > recipe.max_bad * (report.bad + good):
        raise CurationError(
            f"{report.bad:,} of {report.bad + good:,} documents cannot be used, more than max_bad, {recipe.max_bad:g}: "
            + "; ".join(report.bad_named[:5])
        )
