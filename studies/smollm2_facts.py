"""Everything that the SmolLM2 study has measured so far, as values for JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smollm2_children import LR, PARENT, SCRATCH_LR, SIZES, SPEED, TRAINED, WAYS
from smollm2_scores import bits_per_byte

from minitron.compress.costs import training_flops
from minitron.evaluate.compare import difference_of, mean_of
from minitron.shapes import describe

if TYPE_CHECKING:
    from smollm2 import Study

NAME = "smollm2"
MISSING = "not run"


def facts(study: Study) -> dict[str, Any]:
    """Everything that was measured, as values for JSON."""
    from machine import describe as describe_machine  # type: ignore[reportMissingImports]

    steps = [step for step in study.steps() if SPEED not in step.name]
    parent = _model(study, PARENT, "", 0)
    sizes = {size: _size(study, size) for size in SIZES if (study.run / "shapes" / f"{size}.json").is_file()}
    models = [_model(study, *key) for key in _keys(study)]
    for model in models:
        model["against"] = _against(model, parent)
    for model in (parent, *models):
        model["tasks"] = {name: _short(row) for name, row in model["tasks"].items()}
        model.pop("rows")
    about = describe_machine(smoke=True)
    return {
        "study": NAME,
        "smoke": study.inputs.smoke,
        "machine": {key: about[key] for key in ("device", "threads", "torch", "python")},
        "steps": {"done": sum(step.is_done() for step in steps), "of": len(steps)},
        "processor_hours": _hours(study.run / "ledger.jsonl"),
        "settings": {
            "sequence": study.settings.sequence, "batch": study.settings.batch, "lr": LR, "scratch_lr": SCRATCH_LR,
            "calibration_tokens": study.settings.calibration * study.settings.sequence, "seeds": 1,
            "rounds": [{**vars(x), "flops": _round_flops(study, x.tokens)} for x in study.settings.rounds],
        },
        "sizes": sizes,
        "parent": parent,
        "models": models,
        "speed": _speeds(study),
    }  # fmt: skip


def _round_flops(study: Study, tokens: int) -> float:
    """Of training all children on so many tokens from the start, about: with the shapes of depth alone."""
    children = [study.shape_of("depth", size).config(study.config) for size in SIZES]
    return len(TRAINED) * sum(training_flops(c, study.config, tokens, study.settings.sequence) for c in children)


def _keys(study: Study) -> list[tuple[str, str, int]]:
    """(way, size, tokens) of every model that can be in the report."""
    tokens = [0, *(round_.tokens for round_ in study.settings.rounds)]
    return [(way, size, n) for size in SIZES for way in WAYS for n in tokens if n or way != "scratch"]


def _model(study: Study, way: str, size: str, tokens: int) -> dict[str, Any]:
    found = study.scores(f"{way}-{size}-{tokens}" if size else way).found
    rows = {name: row["scores"] for name, row in found["tasks"].items() if row["scores"]}
    text = {name: bits_per_byte(found["text"].get(name, [])) for name in study.inputs.heldout}
    known = bool(size) and any(text.values())
    return {
        "way": way, "size": size, "tokens": tokens, "text": text, "tasks": rows,
        "trained_tokens": study.tokens(way, size, tokens) if known else 0,
        "flops": study.flops(way, size, tokens) if known else 0.0,
        "rows": {"text": found["text"], "tasks": rows},
    }  # fmt: skip


def _size(study: Study, size: str) -> dict[str, Any]:
    found = json.loads((study.run / "shapes" / f"{size}.json").read_text(encoding="utf-8"))
    counts = {}
    for way in ("ours", "depth"):
        shape = describe(study.shape_of(way, size).config(study.config))
        counts[way] = {
            "shape": str(study.shape_of(way, size)),
            "parameters": shape.num_parameters(),
            "non_embedding_parameters": shape.num_non_embedding_parameters(),
            "share": shape.num_non_embedding_parameters() / study.whole,
        }
    return {**counts, "ranked": found["ranked"]}


def _against(model: dict[str, Any], parent: dict[str, Any]) -> dict[str, Any]:
    """Losses of bits per byte as shares, and differences of scores, on what both were measured on."""
    text = {}
    for name, rows in model["rows"]["text"].items():
        mine, theirs = (bits_per_byte(x[: len(rows)]) for x in (rows, parent["rows"]["text"].get(name, [])))
        if mine and theirs and mine["pieces"] == theirs["pieces"]:
            text[name] = mine["value"] / theirs["value"] - 1
    tasks = {}
    for name, rows in model["rows"]["tasks"].items():
        theirs = parent["rows"]["tasks"].get(name, [])
        both = min(len(rows), len(theirs))
        if both > 1:
            gap = difference_of(rows[:both], theirs[:both])
            tasks[name] = {"difference": gap.value, "stderr": gap.stderr, "documents": both}
    return {"text": text, "tasks": tasks}


def _short(rows: list[float]) -> dict[str, Any]:
    mean = mean_of(rows)
    return {"score": mean.value, "stderr": None if math.isnan(mean.stderr) else mean.stderr, "documents": len(rows)}


def _hours(ledger: Path) -> float:
    if not ledger.is_file():
        return 0.0
    return sum(json.loads(line)["cpu"] for line in ledger.read_text(encoding="utf-8").splitlines()) / 3600


def _speeds(study: Study) -> dict[str, Any]:
    paths = sorted((study.run / "speed").glob("*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def is_known(model: dict[str, Any]) -> bool:
    """Whether something of it was measured."""
    return any(model["text"].values())


def longest(found: dict[str, Any], way: str, size: str, measured: str = "text") -> dict[str, Any] | None:
    """The child that was trained longest, of those whose "text" or "tasks" were measured."""
    known = [
        m for m in found["models"]
        if m["way"] == way and m["size"] == size and m["tokens"] and any(m[measured].values())
    ]  # fmt: skip
    return max(known, key=lambda m: m["tokens"], default=None)
