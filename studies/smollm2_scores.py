"""Scores of one model in the SmolLM2 study: bits per byte of held-out pieces, and accuracy on seven tasks.

What is measured is kept in one file for each model, piece by piece and document by document. Measuring more of them
continues that file, and a process that is killed loses one piece or one task.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from smollm2_inputs import TASKS, Document, Inputs

from minitron.checkpoint.fingerprint import fingerprint
from minitron.evaluate.answers import Answers
from minitron.evaluate.harness import MinitronLM
from minitron.evaluate.quick import perplexity
from minitron.evaluate.run import quiet_harness
from minitron.files import write_json


class Scores:
    """The scores of a model.

    Args:
        path: file of the scores.
        inputs: held-out text and documents.
        cache: folder of answers to the tasks' requests.
    """

    def __init__(self, path: Path, inputs: Inputs, cache: Path) -> None:
        self.path, self.inputs, self.cache = path, inputs, cache
        self.found: dict[str, Any] = {"text": {}, "tasks": {}}
        if path.is_file():
            self.found = json.loads(path.read_text(encoding="utf-8"))

    def has_text(self, pieces: int) -> bool:
        """Whether so many pieces of each held-out text were scored, or all that there are."""
        every = self.inputs.heldout
        return all(len(self.found["text"].get(name, ())) >= min(pieces, len(texts)) for name, texts in every.items())

    def has_tasks(self, documents: int) -> bool:
        """Whether each task was run on so many documents; tasks whose files are missing do not count."""
        return all(self._is_enough(name, documents) for name in TASKS)

    def _is_enough(self, name: str, documents: int) -> bool:
        row = self.found["tasks"].get(name)
        return row is not None and (row["missing"] or row["asked"] >= documents)

    def score_text(self, model: Any, tokenizer: Any, pieces: int) -> None:
        """Score held-out text up to so many pieces: (nats, bytes, tokens) of each."""
        for number in range(pieces):  # in turn, so that an interrupted run has some of each text
            for name, texts in self.inputs.heldout.items():
                rows = self.found["text"].setdefault(name, [])
                if len(rows) == number < len(texts):
                    one = perplexity(model, tokenizer, [texts[number]])
                    rows.append([one.nats, one.bytes, one.tokens])
                    self._keep()

    def score_tasks(self, model: Any, tokenizer: Any, folder: Path, documents: int) -> None:
        """Run the tasks on so many documents: 0 or 1 for each."""
        quiet_harness()
        with Answers(self.cache, fingerprint(folder)) as answers:
            for name in TASKS:
                if not self._is_enough(name, documents):
                    docs = self.inputs.documents(name, documents)
                    scores = [] if docs is None else run_task(name, docs, model, tokenizer, answers)
                    self.found["tasks"][name] = {"missing": docs is None, "asked": documents, "scores": scores}
                    self._keep()

    def _keep(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.found)


def run_task(name: str, documents: list[Document], model: Any, tokenizer: Any, answers: Answers) -> list[float]:
    """The score of each document, by the harness's own definition of the task without examples in the prompt."""
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks._yaml_loader import load_yaml

    task = TASKS[name]
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / task.file, resolve_func=True)
    made = datasets.DatasetDict({task.split: datasets.Dataset.from_list(documents)})
    config = {key: value for key, value in config.items() if key not in ("tag", "group")}
    config |= {"num_fewshot": 0, "custom_dataset": lambda **_: made, "dataset_kwargs": None}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        config[key] = config.get(key) if config.get(key) == task.split else None
    built = ConfigurableTask(config=config)
    lm = MinitronLM(model, tokenizer, answers, {name: [str(built.VERSION), 0]})
    found: Any = evaluate(lm, {name: built}, bootstrap_iters=0, log_samples=True)
    rows = sorted(found["samples"][name], key=lambda row: row["doc_id"])
    return [float(row[task.metric]) for row in rows]


def bits_per_byte(rows: list[list[float]]) -> dict[str, float] | None:
    """Bits per byte of pieces with its standard error over them (of a ratio of sums), and what it was measured on."""
    if not rows:
        return None
    nats, size, tokens = (sum(row[i] for row in rows) for i in range(3))
    value = nats / math.log(2) / size
    error = math.nan
    if len(rows) > 1:
        gaps = [row[0] / math.log(2) - value * row[1] for row in rows]
        error = math.sqrt(sum(gap * gap for gap in gaps) * len(rows) / (len(rows) - 1)) / size
    return {"value": value, "stderr": error, "pieces": len(rows), "tokens": tokens, "bytes": size}
