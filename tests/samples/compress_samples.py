"""A tiny teacher, a text and a recipe for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from text_checkpoint import make_text_checkpoint

TEXT = (
    "the cat sat on a mat and the old dog ran to the sea while little birds sang about rain and wind and snow all day"
)
WORDS = TEXT.split()


def write_text(path: Path, documents: int = 60) -> Path:
    rows = [" ".join(WORDS[(i * 7 + j * (1 + i % 3)) % len(WORDS)] for j in range(25)) for i in range(documents)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def small_recipe(folder: Path, **changes: Any) -> dict[str, Any]:
    """Plain values of a recipe that takes seconds; teacher and text are made in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher = folder / "teacher"
    if not teacher.exists():
        make_text_checkpoint(teacher)
        write_text(folder / "text.jsonl")
    return {
        "model": str(teacher),
        "data": [str(folder / "text.jsonl")],
        "heldout_share": 0.2,
        "targets": [{"non_embedding_params": "9k", "name": "small"}],
        "calibration": {"blocks": 4, "compensation": False},
        "ranking": {
            "scored": 4, "most": 2, "tokens": 512, "rungs": [0.5], "score_blocks": 2,
            "grid": {"layers": [1, 2], "heads": [2, 4], "groups": [2], "hidden": [24, 32], "ffn": [32, 40, 48, 56, 64]},
        },
        "train": {"tokens": 768, "batch": 2, "sequence": 64, "lr": 1e-3, "warmup": 1, "eval_every": 2, "save_every": 2},
        "prompts": ["the cat"],
        **changes,
    }  # fmt: skip
