"""The result of an evaluation as a table for the terminal and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def table(result: dict[str, Any]) -> str:
    """Scores side by side with standard errors, differences with p-values, and published values.

    Args:
        result: `run.Evaluation.as_dict()`.
    """
    labels = [model["label"] for model in result["models"]]
    lines = [["task", "metric", "shots", "documents", *labels]]
    for task in result["tasks"].values():
        cells = [_with_error(row["score"], row["stderr"]) for row in task["models"]]
        lines.append([task["title"], task["metric"], str(task["shots"]), f"{task['documents']:,}", *cells])
    parts = [f"suite: {result['suite']}; percent, with standard errors", _columns(lines)]
    gaps = [
        [
            task["title"],
            f"{gap['model']} - {gap['against']}",
            _with_error(gap["difference"], gap["stderr"], "+"),
            f"p = {gap['p_value']:.2g}",
            gap["test"],
        ]
        for task in result["tasks"].values()
        for gap in task["differences"]
    ]
    if gaps:
        parts += ["differences on the same documents", _columns(gaps)]
    parts += _published(result) + list(_remarks(result))
    return "\n\n".join(parts)


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.1f}" + (f" ± {error:.1f}" if error is not None else "")


def _columns(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _published(result: dict[str, Any]) -> list[str]:
    models: dict[tuple[str, str], dict[str, float]] = {}
    for name, task in result["tasks"].items():
        for row in task["published"]:
            models.setdefault((row["model"], row["source"]), {})[name] = row["score"]
    if not models:
        return []
    tasks = {name: task["title"] for name, task in result["tasks"].items()}
    lines = [["model", *tasks.values(), "source"]]
    for (model, source), scores in models.items():
        lines.append([model, *(f"{scores[name]:.1f}" if name in scores else "-" for name in tasks), source])
    return ["published scores, not measured here", _columns(lines)]


def _remarks(result: dict[str, Any]) -> list[str]:
    remarks = []
    for task in result["tasks"].values():
        for row in task["models"]:
            for key, what in (
                ("truncated_requests", "prompts did not fit into the context and were truncated from the left"),
                ("shortened_generations", "generations had less room than the task allows"),
            ):
                if row[key]:
                    remarks.append(f"{task['title']}, {row['model']}: {row[key]:,} of {row['requests']:,} {what}")
    remarks += [f"{name} was skipped: {why}" for name, why in result["skipped"].items()]
    return ["\n".join(remarks)] if remarks else []


def check_plot(path: Path) -> None:
    """Refuse a suffix that `plot` does not write.

    Raises:
        ValueError: another suffix.
    """
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"{path}: plots are written as .png, .svg or .pdf")


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars with standard errors, one group per task, with the family's published scores as marks. PNG, SVG or PDF.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: a suffix that matplotlib does not write.
    """
    check_plot(path)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tasks, models = list(result["tasks"].values()), result["models"]
    figure, axes = pyplot.subplots(figsize=(max(5, 1.6 * len(tasks) + 2), 4), layout="constrained")
    width = 0.8 / len(models)
    for place, model in enumerate(models):
        rows = [task["models"][place] for task in tasks]
        where = [at + (place - (len(models) - 1) / 2) * width for at in range(len(tasks))]
        errors = [row["stderr"] or 0.0 for row in rows]
        axes.bar(where, [row["score"] for row in rows], width, yerr=errors, capsize=2, label=model["label"])
    points = [(at, row["score"]) for at, task in enumerate(tasks) for row in task["published"]]
    if points:
        axes.scatter(*zip(*points, strict=True), marker="_", color="black", label="published", zorder=3)
    axes.set_xticks(range(len(tasks)), [f"{task['title']}\n{task['shots']}-shot" for task in tasks])
    axes.set_ylabel("score, percent")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
