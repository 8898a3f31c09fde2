"""Candidates ranked by a score, which `candidates.jsonl` keeps.

Without retraining the score is the loss of the model that is cut, or its distance from the source, on text that was
not used for importance. The paper (arXiv:2407.14679, Figure 9) finds that such ranks change during the first three
hundred steps of retraining; a `Scorer` that retrains can be passed instead.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..checkpoint.hf import open_hf
from ..checkpoint.tensors import LazyTensor
from ..data.packing import Batch
from ..files import writing
from ..ops.loss import IGNORE_INDEX, shift_labels
from .architecture import Architecture
from .head_loss import judge
from .plan import PrunePlan
from .search import Candidate, SearchError
from .streaming import HEAD_BLOCK_BYTES, StreamedModel, StreamError, Walk, batch_digest
from .surgery import pruned

_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Scorer:
    """How a plan is judged."""

    name: str
    """Method and data; scores of another name in `candidates.jsonl` are ignored."""
    score: Callable[[PrunePlan], float]
    higher_is_better: bool = False


@dataclass(frozen=True)
class Ranked:
    """A candidate with its score; NaN if it could not be computed."""

    candidate: Candidate
    plan: str
    """Hash of the plan that was judged."""
    score: float


def zero_shot(
    source: Path,
    blocks: Batch,
    measure: Literal["loss", "kl"] = "loss",
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Scorer:
    """Judge the model that a plan cuts out of `source` as it is, layer by layer: nothing is written, no model is built.

    Args:
        source: checkpoint folder with an LM head.
        blocks: (B, T) text that importance was not measured on.
        measure: "loss", nats per token; or "kl", the mean divergence KL(source || cut) of next-token distributions,
            exact over the whole vocabulary. Lower is better for both.
        dtype: of the computation.
        device: where layers run.
    """
    checkpoint = open_hf(source)
    teacher: list[Walk] = []

    def score(plan: PrunePlan) -> float:
        model = StreamedModel(pruned(checkpoint, plan), dtype, device)
        try:
            walk = walk_through(model, blocks)
        except StreamError:  # activations that overflow
            return math.nan
        if measure == "loss":
            return judge(walk, [])[()].loss
        if not teacher:
            teacher.append(walk_through(StreamedModel(open_hf(source), dtype, device), blocks))
        return divergence(teacher[0], walk)

    return Scorer(f"{measure} on {batch_digest(blocks)[:16]} in {str(dtype).removeprefix('torch.')}", score)


def walk_through(model: StreamedModel, blocks: Batch) -> Walk:
    """Take blocks through all layers; the last hidden states stay in memory."""
    walk = Walk(model, blocks)
    for step in walk.steps():
        for _ in step.run():
            pass
    return walk


@torch.no_grad()
def divergence(teacher: Walk, student: Walk) -> float:
    """Mean KL(teacher || student) of the next token in nats, over labelled positions; the heads in blocks of rows."""
    labelled = (shift_labels(student.blocks.labels) != IGNORE_INDEX).flatten()
    positions = labelled.nonzero()[:, 0]
    hidden = [walk.at[()].get(range(walk.count)).flatten(0, 1) for walk in (teacher, student)]
    norms = [walk.model.norm() for walk in (teacher, student)]
    heads = (teacher.model.head(), student.model.head())
    if heads[0].shape[0] != heads[1].shape[0]:
        raise StreamError(f"vocabularies differ: {heads[0].shape[0]} and {heads[1].shape[0]} tokens")
    total = 0.0
    for part in positions.split(_TOKENS_AT_ONCE):
        pair = [
            norm(states[part].to(walk.model.device))
            for norm, states, walk in zip(norms, hidden, (teacher, student), strict=True)
        ]
        total += float(_divergences(pair[0], pair[1], _head_blocks(*heads)).sum())
    return total / len(positions)


def _head_blocks(one: LazyTensor, two: LazyTensor) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, HEAD_BLOCK_BYTES // max(1, one.nbytes // one.shape[0]))
    for start in range(0, one.shape[0], rows):
        stop = min(start + rows, one.shape[0])
        yield one.rows(start, stop), two.rows(start, stop)


def _divergences(teacher: Tensor, student: Tensor, heads: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """KL per row, (T,) float64. With z the logits: sum p (z_t - z_s) - lse(z_t) + lse(z_s), p the teacher's."""
    count = len(teacher)
    peak = [teacher.new_full((count,), -torch.inf, dtype=torch.float64) for _ in range(2)]
    mass = [teacher.new_zeros(count, dtype=torch.float64) for _ in range(2)]
    cross = teacher.new_zeros(count, dtype=torch.float64)
    for block in heads:
        z = [h @ w.to(h.device, h.dtype).T for h, w in zip((teacher, student), block, strict=True)]
        for i in range(2):
            higher = torch.maximum(peak[i], z[i].amax(1).double())
            shrink = (peak[i] - higher).exp()  # 0 for the first block
            weights = (z[i] - higher[:, None].to(z[i].dtype)).exp()
            mass[i] = mass[i] * shrink + weights.sum(1, dtype=torch.float64)
            if i == 0:
                cross = cross * shrink + (weights * (z[0] - z[1])).sum(1, dtype=torch.float64)
            peak[i] = higher
    return cross / mass[0] - (peak[0] + mass[0].log()) + (peak[1] + mass[1].log())


# --- ranking ---------------------------------------------------------------------------------------------------------


def rank_candidates(
    candidates: Sequence[Candidate],
    plan_of: Callable[[Architecture], PrunePlan],
    scorer: Scorer,
    path: Path,
    progress: Callable[[Ranked, int], object] = lambda *_: None,
) -> list[Ranked]:
    """Score every candidate and return them, best first; those without a score come last.

    Args:
        candidates: what `enumerate_architectures` found.
        plan_of: the plan for a shape.
        scorer: how to judge a plan.
        path: `candidates.jsonl`. Scores in it of the same plans by the same method are not computed again.
        progress: called with each result and how many are done.

    Raises:
        SearchError: no candidate; the file has a line that is not a score.
    """
    if not candidates:
        raise SearchError("no candidate to rank")
    known = {(row["plan"], row["method"]): row["score"] for row in read_candidates(path)}
    found: list[Ranked] = []
    for candidate in candidates:
        plan = plan_of(candidate.architecture)
        key = (plan.hash, scorer.name)
        if key not in known:
            begin = time.perf_counter()
            value = scorer.score(plan)
            known[key] = value if math.isfinite(value) else None
            _append(path, candidate, plan, scorer.name, known[key], time.perf_counter() - begin)
        score = known[key]
        found.append(Ranked(candidate, plan.hash, math.nan if score is None else score))
        progress(found[-1], len(found))
    sign = -1 if scorer.higher_is_better else 1
    return sorted(found, key=lambda ranked: (math.isnan(ranked.score), sign * ranked.score))


def read_candidates(path: Path) -> list[dict[str, Any]]:
    """The lines of `candidates.jsonl`, none if it is not there. A last line that was cut off by a crash is dropped.

    Raises:
        SearchError: a line that is not a score; named by its number.
    """
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            good = isinstance(row["plan"], str) and isinstance(row["method"], str)
            good = good and isinstance(row["score"], float | int | None)
        except (ValueError, KeyError, TypeError):
            good, row = False, {}
        if not good:
            raise SearchError(f"{path}: line {number} is not the score of a candidate; delete the file to rank again")
        rows.append(row)
    return rows


def _append(
    path: Path, candidate: Candidate, plan: PrunePlan, method: str, score: float | None, seconds: float
) -> None:
    row = {**candidate.as_dict(), "plan": plan.hash, "method": method, "score": score, "seconds": round(seconds, 3)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), path.open("a+b") as file:
        content_end = file.seek(0, os.SEEK_END)
        if content_end:  # cut off what a crash left of a line
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
