"""Tasks of lm-evaluation-harness by name: definitions are the harness's own, data come from files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from minitron.evaluate.harness_tasks import find_task
from minitron.evaluate.suites import TaskPlan, build_tasks, plan
from minitron.evaluate.task_data import TaskDataError

ROWS = {
    "boolq": {"question": "is water wet", "passage": "Water is wet.", "answer": True},
    "lambada_openai": {"text": "The cat sat on the", "target": "mat"},
    "piqa": {"goal": "To cut", "sol1": "use a knife", "sol2": "use a cup", "label": "0"},
}


def write(folder: Path, name: str, split: str, row: dict[str, object]) -> None:
    (folder / name).mkdir()
    (folder / name / f"{split}.jsonl").write_text(json.dumps(row) + "\n")


@pytest.mark.parametrize(
    ("name", "split", "prompt", "target"),
    [
        ("boolq", "validation", "Water is wet.\nQuestion: is water wet?\nAnswer:", 1),
        ("piqa", "validation", "Question: To cut\nAnswer:", 0),
        ("lambada_openai", "test", "The cat sat on the", " mat"),
    ],
)
def test_prompts_are_made_of_files_at_hand(tmp_path: Path, name: str, split: str, prompt: str, target: object) -> None:
    write(tmp_path, name, split, ROWS[name])
    (made,) = plan("page", [name])
    assert made == TaskPlan(name, 0)
    task = build_tasks(made, tmp_path)[name]
    (document,) = task.eval_docs
    assert task.doc_to_text(document) == prompt
    assert task.doc_to_target(document) == target


def test_documents_without_the_needed_fields_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "sciq", "test", {"question": "Which?"})
    with pytest.raises(TaskDataError, match="sciq: document 1 has no field 'correct_answer'; it has question"):
        build_tasks(TaskPlan("sciq", 0), tmp_path)
    with pytest.raises(TaskDataError, match="no test file of openbookqa"):
        build_tasks(TaskPlan("openbookqa", 0), tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ai2_arc", "a group of tasks.*such as arc_easy"),
        ("mbpp", "runs programs that the model writes"),
        ("wikitext", "no score for each document"),
    ],
)
def test_tasks_that_cannot_be_scored_here_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_task(name)


def test_scores_are_chosen_by_preference() -> None:
    found = {name: find_task(name) for name in ("arc_easy", "boolq", "lambada_openai", "nothing_like_it")}
    assert [task and task.metric for task in found.values()] == ["acc_norm", "acc", "acc", None]
