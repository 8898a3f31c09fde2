"""A report as plain data: this is `report.json`, and the page shows nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bench.trust import slower_though_smaller


@dataclass(frozen=True)
class ModelFacts:
    """A model that a run made or began with."""

    name: str
    role: str
    """"teacher", "student", or another role in the run."""
    shape: dict[str, int]
    """Layers, hidden size, heads and so on, by the names of the config."""
    parts: dict[str, int]
    """Parameters of each part; see `NemotronConfig.parameter_counts`."""
    non_embedding: int
    file_bytes: int


@dataclass(frozen=True)
class CandidateFacts:
    """One architecture that was considered."""

    name: str
    parameters: int
    non_embedding: int
    losses: dict[str, float]
    """Tokens of retraining, as text, to held-out loss in nats per token; "0" is before any."""
    outcome: str
    """"chosen", "dropped after N steps", or "not chosen"."""


@dataclass(frozen=True)
class Curve:
    """Held-out loss along a training run."""

    stage: str
    name: str
    tokens: list[int]
    flops: list[float]
    """Of everything that the run computed so far, the teacher's passes included."""
    loss: list[float]
    """Nats per token."""


@dataclass(frozen=True)
class QualityFacts:
    """One number on one text, with its standard error over documents."""

    model: str
    text: str
    measure: str
    value: float
    error: float | None = None


@dataclass(frozen=True)
class SpeedFacts:
    """Decoding on the machine that wrote the report."""

    model: str
    tokens_per_second: float
    """After the first token, whose time includes prefill and compilation; the median of several rounds."""
    quartiles: tuple[float, float]
    bytes_per_token: int
    weight_bytes: int
    engine: str
    first_token_seconds: float | None = None
    """Prefill and one token."""
    load: str | None = None
    """What else the machine ran meanwhile, as a clause; empty if nothing that matters, None if unknown."""


@dataclass(frozen=True)
class SampleFacts:
    """What each model writes after the same prompt."""

    prompt: str
    texts: dict[str, str]


@dataclass(frozen=True)
class StageFacts:
    """One stage of the run and what it cost."""

    name: str
    tokens: int
    flops: float
    seconds: float
    what: str


@dataclass(frozen=True)
class ImportanceFacts:
    """Scores of the teacher's parts, scaled to the largest of their kind and layer."""

    neurons: list[list[float]]
    """Per layer, sorted downwards and thinned to at most 128 points."""
    heads: list[list[float]]
    channels: list[float]
    """Sorted downwards and thinned likewise."""
    layers: list[float]


@dataclass(frozen=True)
class Report:
    """A whole report."""

    title: str
    summary: list[str]
    """The outcome in a few sentences, figures included."""
    models: list[ModelFacts]
    importance: ImportanceFacts | None
    candidates: list[CandidateFacts]
    curves: list[Curve]
    quality: list[QualityFacts]
    speed: list[SpeedFacts]
    samples: list[SampleFacts]
    stages: list[StageFacts]
    commands: list[str]
    versions: dict[str, str]
    hashes: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def headlines(self) -> dict[str, str]:
        """The outcome of each model but the first, by its name: "29% smaller, held-out loss +17.6%"."""
        if not self.models:
            return {}
        first, *others = self.models
        return {
            model.name: ", ".join(filter(None, (_size(first, model), self._loss(first, model)))) for model in others
        }

    def _loss(self, first: ModelFacts, model: ModelFacts) -> str:
        """How the held-out loss changed, text by text."""
        losses = {(row.model, row.text): row.value for row in self.quality if row.measure == "nats per token"}
        texts = [text for name, text in losses if name == model.name and losses.get((first.name, text))]
        changes = [f"{losses[model.name, text] / losses[first.name, text] - 1:+.1%}" for text in texts]
        if len(changes) < 2:
            return f"held-out loss {changes[0]}" if changes else ""
        named = [f"{change} on {text}" for change, text in zip(changes, texts, strict=True)]
        return f"held-out loss {' and '.join([', '.join(named[:-1]), named[-1]])}"

    def doubts(self) -> dict[str, str]:
        """Sentences about measured speeds that should not be believed, by the model's name."""
        found: dict[str, str] = {}
        for row in self.speed:
            first = self.speed[0]
            reasons = [f"measured on a busy machine: {row.load}" if row.load else ""]
            reasons.append(
                slower_though_smaller(
                    row.tokens_per_second,
                    first.tokens_per_second,
                    row.bytes_per_token,
                    first.bytes_per_token,
                    first.model,
                )
            )
            sentence = "; ".join(filter(None, reasons))
            if sentence:
                found[row.model] = sentence
        return found

    def to_json(self) -> str:
        """The text of `report.json`."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> Report:
        """Read a `report.json` back.

        Raises:
            ValueError: it is not a report.
        """
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            kinds: dict[str, Any] = {
                "models": ModelFacts,
                "candidates": CandidateFacts,
                "curves": Curve,
                "quality": QualityFacts,
                "samples": SampleFacts,
                "stages": StageFacts,
            }
            for name, kind in kinds.items():
                values[name] = [kind(**row) for row in values[name]]
            values["speed"] = [SpeedFacts(**{**row, "quartiles": tuple(row["quartiles"])}) for row in values["speed"]]
            if values["importance"] is not None:
                values["importance"] = ImportanceFacts(**values["importance"])
            return cls(**values)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a report of minitron ({error})") from None


def _size(first: ModelFacts, model: ModelFacts) -> str:
    """How much smaller a model is than the first, by all parameters."""
    share = sum(model.parts.values()) / sum(first.parts.values())
    if round(share, 2) == 1:
        return "same size"
    return f"{1 - share:.0%} smaller" if share < 1 else f"{share - 1:.0%} larger"
