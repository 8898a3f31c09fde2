"""Labels of texts of mixed length on the CPU: `minitron predict` beside transformers' pipeline, in texts a second.

    python benchmarks/predict.py --model smollm2
    python benchmarks/predict.py --smoke             a few texts; the numbers mean nothing

Both have the same model in fp32 (its head has random weights) and the same texts, whose lengths are log-normal. The
pipeline groups texts in the order of the file (`batch_size` 1, its default, 8 and 32), `minitron predict` groups
texts of similar length. They take turns; ratios are medians of the rounds' own. Probabilities are compared.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import describe

from minitron.loading import checkpoint_folder
from minitron.tokenizer import load_tokenizer
from minitron.tune.models import head_model
from minitron.tune.predict import open_predictor

TOPICS = Path(__file__).parents[1] / "examples" / "topics.jsonl"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--words", type=int, default=40, help="median of a text")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5, help="after one that is not counted")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="of the pipeline")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    given = parser.parse_args()
    if given.smoke:
        given.model, given.texts, given.rounds, given.batches = "bundled-half", 12, 1, [4]
    with tempfile.TemporaryDirectory() as folder:
        result = _measure(given, Path(folder))
    print(json.dumps(result, indent=2))
    if given.out:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source = checkpoint_folder(given.model)
    tokenizer = load_tokenizer(source)
    labels = {"num_labels": 4, "id2label": {i: f"label {i}" for i in range(4)}, "problem_type": None}
    model, pad = head_model(source, tokenizer, "sequence-classification", labels, 0, "cpu")
    model.save_pretrained(folder)  # type: ignore[operator]
    texts = _texts(given.texts, given.words)
    predictor = open_predictor(folder, tokenizer, "fp32", torch.device("cpu"), given.sequence)
    items = [predictor.convert({"text": text}) for text in texts]
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    theirs = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32)
    tokenizer.pad_token_id = pad
    pipeline: Any = transformers.pipeline("text-classification", theirs, tokenizer=tokenizer, device="cpu")
    options = {"truncation": True, "max_length": given.sequence, "top_k": None}
    works: dict[str, Callable[[], Any]] = {"minitron": lambda: list(predictor.predict(items, 32))}
    for size in given.batches:
        works[f"pipeline {size}"] = lambda size=size: pipeline(texts, batch_size=size, **options)
    rounds = []
    for number in range(given.rounds + 1):
        order = list(works)[:: 1 if number % 2 else -1]
        rounds.append({name: _timed(works[name]) for name in order})
        times = ", ".join(f"{name} {seconds:.2f}" for name, (seconds, _) in rounds[-1].items())
        print(f"round {number}, seconds: {times}", file=sys.stderr)
    differences = [_difference(rounds[0]["minitron"][1], rounds[0][name][1]) for name in works if name != "minitron"]
    found = {}
    for name in works:
        ratios = [each[name][0] / each["minitron"][0] for each in rounds[1:]]
        found[name] = {"texts_per_s": len(texts) / statistics.median(each[name][0] for each in rounds[1:]),
                       "minitron_speed_ratio": statistics.median(ratios)}  # fmt: skip
    difference = max(differences)
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=given.sequence)["input_ids"]]
    return {"machine": describe("cpu", smoke=True), "model": Path(given.model).name, "texts": len(texts),
            "tokens": {"median": statistics.median(lengths), "mean": statistics.mean(lengths), "most": max(lengths)},
            "padded_tokens_per_token": {str(size): _padded(lengths, size) for size in given.batches},
            "largest_difference_of_probabilities": difference, "rounds": given.rounds, "found": found}  # fmt: skip


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def _texts(count: int, median: int) -> list[str]:
    """Texts of random words."""
    words = sorted({word for line in TOPICS.read_text(encoding="utf-8").splitlines() for word in line.split()[1:]})
    words = [word for word in words if word.isalpha()]
    draw = random.Random(0)
    return [" ".join(draw.choices(words, k=int(median * draw.lognormvariate(0, 0.9)) + 1)) for _ in range(count)]


def _padded(lengths: list[int], size: int) -> float:
    """Tokens with padding, of groups in the texts' order, over those without."""
    groups = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    return sum(max(group) * len(group) for group in groups) / sum(lengths)


def _difference(ours: list[dict[str, Any]], theirs: list[list[dict[str, Any]]]) -> float:
    """The largest difference of a probability."""
    return max(
        abs(row["probabilities"][each["label"]] - each["score"])
        for row, labels in zip(ours, theirs, strict=True)
        for each in labels
    )


if __name__ == "__main__":
    main()
