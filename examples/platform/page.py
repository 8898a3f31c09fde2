"""The page about a run: what was done, by which commands, and what came out."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader
from stages import Stage

import minitron

DIRT = {
    "e-mail addresses": r"\w+@\w+\.\w+",
    "menus and cookie notices": r"Accept all cookies|Share on Facebook",
    "repeated advertisements": r"Buy cheap watches",
    "German": r"\bDer alte Mann\b|\bDie Kinder spielten\b",
    "wrong encoding": r"\u00e2\u20ac",
    "lists of symbols": r"(?:### |@@ ){2}",
}


def dirt_left(text: str) -> dict[str, int]:
    """Documents and marks of planted dirt in curated shards."""
    documents = [json.loads(line)["text"] for line in text.splitlines()]
    left = {kind: sum(bool(re.search(pattern, row)) for row in documents) for kind, pattern in DIRT.items()}
    return {"documents": len(documents), "exact duplicates": len(documents) - len(set(documents)), **left}


def render(stages: list[Stage], settings: dict[str, Any]) -> str:
    """The page as one HTML file without outside parts."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.filters["count"] = lambda value: f"{value:,}"
    css = (Path(minitron.__file__).parent / "assets" / "report.css").read_text(encoding="utf-8")
    by_name = {stage.name: stage for stage in stages}
    return environment.get_template("page.html.jinja").render(
        stages=stages, by_name=by_name, settings=settings, css=css,
        curves={name: _curve(by_name[stage].folder / "run" / rest) for name, stage, rest in (
            ("training", "train", "metrics.jsonl"),
            ("retraining of the half", "compress", "half/distill/run/metrics.jsonl"),
            ("conversation", "chat", "metrics.jsonl"),
        )},
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, Python {platform.python_version()}, "
        f"torch {torch.__version__}, minitron {minitron.__version__}",
        parameters={name: _parameters(by_name["train"].folder.parent / folder) for name, folder in (
            ("trained", "train/run/model"), ("half", "compress/run/half/distill/run/model"), ("chat", "chat/run/model"),
        )},
    )  # fmt: skip


def _parameters(folder: Path) -> dict[str, int]:
    config = minitron.NemotronConfig.from_pretrained(folder)
    return {"all": config.num_parameters(), "without embeddings": config.num_non_embedding_parameters()}


def _curve(metrics: Path, width: int = 320, height: int = 120) -> dict[str, Any]:
    """Points of a line of losses over steps, its ends, for an SVG of this size."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    points = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    if len(points) < 2:
        return {}
    steps, losses = zip(*points, strict=True)
    span = max(losses) - min(losses) or 1.0
    xy = [(width * (x - steps[0]) / (steps[-1] - steps[0]), height * (1 - (y - min(losses)) / span)) for x, y in points]
    return {
        "points": " ".join(f"{x:.1f},{y:.1f}" for x, y in xy),
        "first": losses[0],
        "last": losses[-1],
        "steps": steps[-1],
        "width": width,
        "height": height,
    }
