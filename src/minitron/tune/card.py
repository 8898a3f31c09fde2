"""The model card of a customized model: what it learned from, its scores beside baselines, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LEARNED = {"classify": "Labels", "ner": "Types of names"}
_READS = {
    False: "config.json says so (`is_causal`), and transformers honours it.",
    True: "Load it with minitron: transformers alone does not know `bidirectional_layers` and would answer otherwise.",
}


def score_table(report: Mapping[str, Any]) -> str:
    """Scores of the model and of the baselines as a Markdown table; empty if nothing was tested."""
    scores = report.get("scores")
    if not scores:
        return ""
    names = list(dict.fromkeys(name for row in scores.values() for name in row))
    lines = [f"| | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for title, row in scores.items():
        cells = (f"{row[name]:.4f}" if name in row else "" for name in names)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def card(base: str, report: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The text of README.md."""
    task = report["task"]
    parts = ["---", "library_name: transformers", f"tags: [minitron, {task}]", "---", ""]
    parts += [f"# {base}, customized ({task})", ""]
    if task == "chat":
        parts += ["Trained on conversations; only the assistant's turns count in the loss.", ""]
    else:
        kinds = f"{_LEARNED[task]}: {', '.join(report['labels'])}. " if "labels" in report else ""
        parts += [f"{kinds}Learned from {report['train_rows']:,} rows.", ""]
    if report.get("attention", "causal") != "causal":
        parts += [f"Attention: {report['attention']}. {_READS[':' in report['attention']]}", ""]
    table = score_table(report)
    if table:
        parts += [f"Scores on {report['test_rows']:,} rows that were set aside before training:", "", table, ""]
    if "calibrated" in report:
        parts += [
            f"Divided by the temperature {report['temperature']:.3f}, which the validation rows choose, the "
            f"probabilities have a calibration error of {report['calibrated']['ece']:.4f}.",
            "",
        ]
    shown = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    parts += [f"Settings: {shown}.", ""]
    use = "minitron chat MODEL" if task in ("chat", "dpo") else "minitron predict MODEL rows.jsonl"
    parts += ["```console", use, "```", ""]
    return "\n".join(parts)
