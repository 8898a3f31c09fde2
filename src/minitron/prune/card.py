"""Before and after, as numbers, as a table for the terminal, and as the model card that goes with the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..bench.speeds import Speed
from ..bench.trust import below_prediction, slower_though_smaller
from ..checkpoint.hf import read_config
from ..config import ModelConfig
from ..families import family_of
from ..files.links import leads_inside
from ..shapes import PARTS, describe
from ..version import __version__
from .architecture import Architecture
from .plan import PrunePlan
from .search import Machine

FOLDER = "pruning"
"""Folder of the further files of a checkpoint: some readers take every *.safetensors file beside `config.json` for
weights."""
CARD = "README.md"
PLAN, SCORES, CANDIDATES = "plan.json", "importance.safetensors", "candidates.jsonl"
BEFORE, AFTER = "source", "result"
"""Names of the two models that are compared."""


@dataclass(frozen=True)
class Facts:
    """What is known about one model; None where something was not measured."""

    architecture: dict[str, int]
    parameters: dict[str, int]
    weight_bytes: int
    cache_bytes_per_token: float
    loss: float | None
    """Nats per token on held-out text."""
    predicted_tokens_per_second: float | None
    measured_tokens_per_second: float | None
    """After the first token."""
    first_token_seconds: float | None = None
    """Prefill of a short prompt and one token, with everything compiled."""
    doubt: str = ""
    """Why the measured speed is doubtful; empty if it is not."""

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        weight_bytes: int,
        machine: Machine,
        loss: float | None = None,
        measured: Speed | None = None,
    ) -> Facts:
        """Facts that follow from the configuration, and those that were measured."""
        shape = describe(config)
        counts = shape.parameter_counts()
        totals = {"total": shape.num_parameters(), "non_embedding": shape.num_non_embedding_parameters()}
        return cls(
            Architecture.of(config).as_dict(),
            {**counts, **totals},
            weight_bytes,
            shape.kv_bytes_per_token(4 if machine.dtype == "fp32" else 2),
            loss,
            machine.speed(config),
            None if measured is None else measured.tokens_per_second,
            None if measured is None else measured.first_token_seconds,
        )


def with_doubts(
    before: Facts, after: Facts, predicted: tuple[float | None, float | None], load: str
) -> tuple[Facts, Facts]:
    """Both models with the reasons to doubt their measured speeds.

    Args:
        predicted: tokens per second of both models in the dtype that was measured.
        load: what else the machine ran meanwhile, as a clause; empty if nothing that matters.
    """
    found = []
    for side, expected in zip((before, after), predicted, strict=True):
        measured = side.measured_tokens_per_second
        found.append([f"measured on a busy machine: {load}"] if load and measured else [])
        if measured and expected:
            found[-1].append(below_prediction(measured, expected))
    one, two = before.measured_tokens_per_second, after.measured_tokens_per_second
    if one and two and predicted[0] and predicted[1]:  # bytes per token are the inverse of predictions
        found[1].append(slower_though_smaller(two, one, 1 / predicted[1], 1 / predicted[0]))
    doubts = ["; ".join(filter(None, reasons)) for reasons in found]
    return replace(before, doubt=doubts[0]), replace(after, doubt=doubts[1])


def table(before: Facts, after: Facts) -> list[tuple[str, str, str, str]]:
    """Rows (what, before, after, ratio)."""
    rows = [(axis, *_row(before.architecture[axis], after.architecture[axis], "d")) for axis in before.architecture]
    for part in (*PARTS, "total", "non_embedding"):
        name = f"parameters: {part.replace('_', ' ')}"
        rows.append((name, *_row(before.parameters[part], after.parameters[part], ",d")))
    rows.append(("bytes of weights", *_row(before.weight_bytes, after.weight_bytes, ",d")))
    rows.append(("cache bytes per token", *_row(before.cache_bytes_per_token, after.cache_bytes_per_token, ",.0f")))
    rows.append(("loss, nats per token", *_row(before.loss, after.loss, ".4f", difference=True)))
    for name in ("predicted", "measured"):
        one, two = (getattr(side, f"{name}_tokens_per_second") for side in (before, after))
        doubtful = name == "measured" and (before.doubt or after.doubt)
        rows.append((f"tokens/s, {name}{' (doubtful, see the notes)' if doubtful else ''}", *_row(one, two, ",.1f")))
    rows.append(("seconds to the first token", *_row(before.first_token_seconds, after.first_token_seconds, ".4f")))
    return rows


def _row(before: float | None, after: float | None, form: str, *, difference: bool = False) -> tuple[str, str, str]:
    texts = tuple("-" if value is None else format(value, form) for value in (before, after))
    if before is None or after is None:
        return (*texts, "")  # type: ignore[return-value]
    last = f"{after - before:+.4f}" if difference else f"x {after / before:.3f}" if before else ""
    return (*texts, last)  # type: ignore[return-value]


def text_table(before: Facts, after: Facts) -> str:
    """The table for a terminal."""
    rows = [("", "before", "after", ""), *table(before, after)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:>{widths[3]}}".rstrip()
        for row in rows
    )


def model_card(
    source: Path, plan: PrunePlan, before: Facts, after: Facts, settings: dict[str, Any], notes: Sequence[str]
) -> str:
    """README.md of the smaller checkpoint: what it is, how it compares, and how to make it again."""
    lines = ["---", *_front_matter(source), "---", "", f"# {source.resolve().name}, pruned", ""]
    lines += [
        f"Cut out of `{source.resolve().name}` by `minitron prune` {__version__}. The weights were selected, not "
        "retrained: expect a higher loss than the source's until the model is retrained "
        "(arXiv:2407.14679 uses distillation).",
        "",
        "| | before | after | |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in table(before, after)),
        "",
        "Predicted tokens/s: memory bandwidth over the bytes that one token reads if no neuron is zero. Measured: "
        "greedy, both models in turn, without the first token.",
        "",
        "## Made with",
        "",
        *(f"- {name.replace('_', ' ')}: {value}" for name, value in settings.items() if value is not None),
        f"- source fingerprint: `{plan.source}`",
        f"- plan hash: `{plan.hash}`",
        f"- scores hash: `{plan.scores}`" if plan.scores else "- scores: none",
        "",
        *(f"{note}\n" for note in notes),
        "## Reproduction",
        "",
        "The cut depends on the plan alone (compensation, if any, on the calibration text too). The plan was made from "
        "`importance.safetensors`, which other sizes can use without calibration:",
        "",
        "```console",
        f"minitron prune SOURCE OUT --plan {FOLDER}/{PLAN}",
        f"minitron prune SOURCE OTHER --scores {FOLDER}/{SCORES} --keep hidden={after.architecture['hidden']}",
        "```",
        "",
    ]
    return "\n".join(lines)


def _front_matter(source: Path) -> list[str]:
    """The source's licence, language and pipeline tags, which hold for its pruned form too."""
    card = source / CARD
    own = card.is_file() and leads_inside(card, source)
    text = card.read_text(encoding="utf-8", errors="replace") if own else ""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    wanted = re.compile(r"(license|license_name|license_link|language|pipeline_tag):\s*\S")
    kept = [line for line in (match[1] if match else "").splitlines() if wanted.match(line)]
    return [*kept, "library_name: minitron", f"tags: [{family_of(read_config(source)).model_type}, pruned]"]
