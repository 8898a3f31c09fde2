"""Published scores of models of this family, in percent. They are claims of their sources and were not measured here.

Sources: the page "Minitron" of the transformers documentation; Muralidharan et al. 2024 (arXiv:2407.14679), table 2;
Sreenivas et al. 2024 (arXiv:2408.11796), table 1. The page calls five of its values zero-shot; the paper gives the same
values with the shots of its own table.
"""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """A published value."""

    model: str
    task: str
    score: float
    shots: int | None
    """None where the source does not say."""
    source: str


PAGE, PAPER, SECOND = "page", "arXiv:2407.14679 table 2", "arXiv:2408.11796 table 1"
SUITE_SOURCES = {"page": (PAGE,), "paper": (PAPER, SECOND)}
"""The published results that are printed next to each suite."""

_SHOTS = {"winogrande": 5, "arc_challenge": 25, "mmlu": 5, "hellaswag": 10, "gsm8k": 5, "xlsum": 3, "humaneval": 0}
_TASKS = tuple(_SHOTS)
_PAPER_ROWS: dict[str, tuple[float, ...]] = {
    "Nemotron-4 15B": (83.6, 58.8, 66.6, 84.6, 48.5, 32.0, 35.4),
    "Nemotron-3 8B": (75.9, 52.8, 54.7, 78.5, 24.0, 30.9, 20.7),
    "Minitron 8B": (79.0, 52.6, 63.8, 80.7, 51.3, 31.2, 31.6),
    "Minitron 4B": (74.0, 50.9, 58.6, 75.0, 24.1, 29.5, 23.3),
}
_PAGE_ROW = {"mmlu": (58.6, 5), "hellaswag": (75.0, 0), "winogrande": (74.0, 0), "gsm8k": (24.1, 0)} | {
    "arc_challenge": (50.9, 0), "xlsum": (29.5, 0), "humaneval": (23.3, 0),
}  # fmt: skip
_SECOND_TASKS = ("winogrande", "arc_challenge", "mmlu", "hellaswag", "gsm8k", "humaneval")
_SECOND_ROWS: dict[str, tuple[float | None, ...]] = {
    "Llama-3.1-Minitron-4B-Depth": (72.1, 52.6, 58.7, 73.2, 16.8, None),
    "Llama-3.1-Minitron-4B-Width": (73.5, 55.6, 60.5, 76.1, 41.2, None),
    "MN-Minitron-8B": (80.4, 64.4, 69.5, 83.0, 58.5, 36.2),
}

PUBLISHED: tuple[Published, ...] = (
    *(Published("Minitron 4B", task, score, shots, PAGE) for task, (score, shots) in _PAGE_ROW.items()),
    *(
        Published(model, task, score, _SHOTS[task], PAPER)
        for model, row in _PAPER_ROWS.items()
        for task, score in zip(_TASKS, row, strict=True)
    ),
    *(
        Published(model, task, score, None, SECOND)
        for model, row in _SECOND_ROWS.items()
        for task, score in zip(_SECOND_TASKS, row, strict=True)
        if score is not None
    ),
)


def published_for(suite: str, task: str) -> list[Published]:
    """The published scores of a suite for a task."""
    return [row for row in PUBLISHED if row.task == task and row.source in SUITE_SOURCES.get(suite, ())]
