"""The stages that compare all documents with each other, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from .across import AllParts
from .distributions import Distributions
from .exact import first_of_equal
from .near import near_duplicates
from .part import compares_pieces, has_record, read_record
from .personal import masked
from .quality import Mask
from .recipe import Recipe
from .semantic import semantic_duplicates
from .tally import EXAMPLE_CHARACTERS, MOST_EXAMPLES, StageTally

_EQUAL = "equal to another document"
MOST_CLUSTERS = 10
"""Clusters of near duplicates that the report shows, the largest ones."""


class _Clock:
    """CPU and wall seconds of a block."""

    cpu = wall = 0.0


@contextmanager
def _timed() -> Iterator[_Clock]:
    clock, cpu, wall = _Clock(), time.process_time(), time.perf_counter()
    yield clock
    clock.cpu, clock.wall = time.process_time() - cpu, time.perf_counter() - wall


def compare(every: AllParts, work: Path, parts: int, recipe: Recipe, report: Any) -> Mask:
    """Which documents stay. What each stage did, and the clusters, are added to the report."""
    kept = np.ones(len(every), dtype=bool)
    kind = "pieces" if compares_pieces(recipe) else "documents"  # the pass that indexed the documents

    def seconds(name: str) -> float:
        return sum(read_record(work, i, kind)[f"{name}_seconds"] for i in range(parts) if has_record(work, i, kind))

    if recipe.exact is not None and recipe.exact.documents:
        with _timed() as clock:
            after = first_of_equal(every.digests)
        tally = every.tally(kept, after, _EQUAL)
        for text in np.flatnonzero(~after)[:MOST_EXAMPLES].tolist():
            tally.example(_EQUAL, *every.document(text))
        tally.cpu_seconds, tally.wall_seconds = clock.cpu, clock.wall
        report.stages["exact"], kept = tally, after
    near, semantic = recipe.near, recipe.semantic
    if near is not None:
        find: Callable[[Mask], Any] = lambda alive: near_duplicates(  # noqa: E731
            every.keys(near.bands), every.digests, every.sizes, alive, every.gram_reader(near.ngram), near.similarity
        )
        kept = _without_similar("near", "Jaccard", find, every, kept, seconds("near"), report)
    if semantic is not None:
        find = lambda alive: semantic_duplicates(  # noqa: E731
            every.embeddings(), every.digests, every.sizes, alive, semantic.similarity
        )
        kept = _without_similar("semantic", "cosine", find, every, kept, seconds("semantic"), report)
    return kept


def _without_similar(
    name: str, measure: str, find: Callable[[Mask], Any], every: AllParts, kept: Mask, indexing: float, report: Any
) -> Mask:
    """Remove what `find` finds: document -> (document that stays for it, similarity)."""
    reason = "similar to a longer document"
    with _timed() as clock:
        removed = find(kept)
    after = kept.copy()
    after[list(removed)] = False
    tally: StageTally = every.tally(kept, after, reason)
    tally.cpu_seconds, tally.wall_seconds = indexing + clock.cpu, indexing + clock.wall
    for text, (other, similarity) in sorted(removed.items())[:MOST_EXAMPLES]:
        source, place, beginning = every.document(text)
        like, where, _ = every.document(other)
        note = f"[{measure} {similarity:.3f} with {like}{', ' if where else ''}{where}] "
        tally.example(reason, source, place, note + beginning)
    report.stages[name] = tally
    if removed and name == "near":
        report.distributions.merge(_similarities(removed))
    report.clusters[name] = _clusters(removed, every)
    return after


def _similarities(removed: dict[int, tuple[int, float]]) -> Distributions:
    made = Distributions()
    made.add("similarity of near duplicates", [similarity for _, similarity in removed.values()])
    return made


def _clusters(removed: dict[int, tuple[int, float]], every: AllParts) -> dict[str, Any]:
    """A document that stays with all that were removed for it: how many clusters of each size, and the largest ones."""
    members: dict[int, list[tuple[int, float]]] = {}
    for text, (other, similarity) in sorted(removed.items()):
        members.setdefault(other, []).append((text, similarity))
    sizes: dict[int, int] = {}
    for found in members.values():
        sizes[len(found) + 1] = sizes.get(len(found) + 1, 0) + 1
    largest = sorted(members, key=lambda other: (-len(members[other]), other))[:MOST_CLUSTERS]
    return {
        "clusters": len(members),
        "sizes": {str(size): count for size, count in sorted(sizes.items())},
        "largest": [
            {
                "documents": len(members[other]) + 1,
                "kept": _shown(every, other),
                "removed": [
                    {**_shown(every, text), "similarity": round(similarity, 4)}
                    for text, similarity in members[other][:MOST_EXAMPLES]
                ],
            }
            for other in largest
        ],
    }


def _shown(every: AllParts, document: int) -> dict[str, str]:
    source, place, beginning = every.document(document)
    return {"source": source, "place": place, "text": masked(beginning, EXAMPLE_CHARACTERS)}
