"""Draw the picture of the README, `docs/results.svg`, from committed measurements.

    python scripts/readme_picture.py

Left: held-out loss against tokens of training (`studies/results/token_efficiency.json`). Right: decoding speed beside
transformers and llama.cpp (`benchmarks/results/decode_bundled.json`, `decode_4b_prompt512.json`). The file follows the
reader's light or dark theme. It is plain text and the same on every machine, so a test can compare it byte for byte.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "results.svg"
WIDTH, HEIGHT = 880, 400

STYLE = """
text { font: 13px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #1f2328 }
.title { font-size: 15px; font-weight: 600 } .small { font-size: 12px; fill: #59636e }
.card { fill: #ffffff; stroke: #d0d7de } .grid { stroke: #d8dee4 }
.ours { fill: #0969da; stroke: #0969da } .other { fill: #8c959f; stroke: #8c959f } .scratch { fill: #bc4c00; stroke: #bc4c00 }
.line { fill: none; stroke-width: 2.5 } .dashed { fill: none; stroke-width: 1.5; stroke-dasharray: 5 4 }
text.ours, text.other, text.scratch { stroke: none } text.other { fill: #59636e }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small, text.other { fill: #9198a1 }
  .card { fill: #0d1117; stroke: #30363d } .grid { stroke: #262c33 }
  .ours { fill: #58a6ff; stroke: #58a6ff } .other { fill: #6e7681; stroke: #6e7681 }
  .scratch { fill: #f0883e; stroke: #f0883e }
}"""  # noqa: E501


def read(path: str) -> dict[str, Any]:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def curve(points: list[tuple[float, float]], kind: str) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{kind}"/>' for x, y in points]
    return [f'<polyline points="{path}" class="line {kind}" style="fill: none"/>', *dots]


def losses() -> list[str]:
    """Held-out loss against tokens: pruned and distilled, and trained from nothing."""
    found = read("studies/results/token_efficiency.json")
    curves = found["curves"]
    left, right, top, bottom = 62.0, 430.0, 84.0, 334.0
    first, last, least, most = 2e4, 2.6e6, 3.4, 6.4

    def x(tokens: float) -> float:
        return left + (right - left) * math.log(tokens / first) / math.log(last / first)

    def y(loss: float) -> float:
        return bottom - (bottom - top) * (loss - least) / (most - least)

    parts = [text(24, 38, "Shrink: half the size, a fraction of the tokens", "title")]
    parts += [text(24, 59, "held-out loss, nats per token, means of three seeds", "small")]
    for loss in (4.0, 5.0, 6.0):
        parts += [
            line(left, y(loss), right, y(loss), "grid"),
            text(left - 10, y(loss) + 4, f"{loss:.1f}", "small", "end"),
        ]
    for tokens, label in ((3e4, "30k"), (1e5, "100k"), (3e5, "300k"), (1e6, "1M"), (2e6, "2M")):
        parts.append(text(x(tokens), bottom + 20, label, "small", "middle"))
    parts.append(text((left + right) / 2, bottom + 42, "tokens of training (logarithmic)", "small", "middle"))
    parts.append(line(left, bottom, right, bottom, "grid"))
    teacher = found["teacher"]["loss"]
    parts.append(line(left, y(teacher), right, y(teacher), "dashed other"))
    parts.append(text(right, y(teacher) - 7, f"the teacher, twice the size: {teacher:.2f}", "other", "end"))
    ours, scratch = (
        [(x(point["tokens"]), y(point["mean"])) for point in curves[name]]
        for name in ("pruned, compensated, KD", "random weights, CE")
    )
    parts += curve(scratch, "scratch") + curve(ours, "ours")
    parts.append(text(scratch[0][0] + 12, scratch[0][1] - 2, "trained from nothing", "scratch"))
    parts.append(
        text(
            scratch[-1][0] + 4, scratch[-1][1] + 19, f"{curves['random weights, CE'][-1]['mean']:.2f}", "scratch", "end"
        )
    )
    parts.append(text(ours[0][0] - 8, ours[0][1] - 32, "minitron compress:", "ours"))
    parts.append(text(ours[0][0] - 8, ours[0][1] - 15, "pruned and distilled", "ours"))
    reached = curves["pruned, compensated, KD"][-1]["mean"]
    parts.append(text(ours[-1][0] + 10, ours[-1][1] + 4, f"{reached:.2f}", "ours"))
    return parts


def speeds() -> list[str]:
    """Bars of tokens per second, two models, each beside its peers."""
    groups = [
        ("the bundled model, 5.0M parameters", read("benchmarks/results/decode_bundled.json")["rows"][0]),
        (
            "the 4B shape, 8 of its 32 layers, random weights",
            read("benchmarks/results/decode_4b_prompt512.json")["rows"][0],
        ),
    ]
    left, room = 570.0, 200.0
    parts = [text(480, 38, "Run: decoding on two CPU cores", "title")]
    parts.append(text(480, 59, "tokens per second, bf16, AMD EPYC (Zen 5)", "small"))
    for group, (title, row) in enumerate(groups):
        top = 96 + group * 132
        parts.append(text(480, top, title, "small"))
        rates = {"minitron": row, **{name: row["peers"][name] for name in ("llama.cpp", "transformers")}}
        for index, (name, measured) in enumerate(rates.items()):
            rate, y = measured["tokens_per_s"], top + 12 + index * 30
            kind = "ours" if name == "minitron" else "other"
            length = max(2.0, room * rate / row["tokens_per_s"])
            parts.append(text(left - 10, y + 16, name, kind, "end"))
            parts.append(f'<rect x="{left:.1f}" y="{y:.1f}" width="{length:.1f}" height="22" rx="3" class="{kind}"/>')
            label = f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}"
            parts.append(text(left + length + 8, y + 16, label, kind))
    parts.append(text(480, 376, "Higher is better. Without the first token and the compilation.", "small"))
    return parts


def picture() -> str:
    """The whole file."""
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    title = (
        "<title>Held-out loss against tokens of training, and decoding speed beside llama.cpp and transformers</title>"
    )
    card = f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" class="card"/>'
    return "\n".join([head, title, f"<style>{STYLE}\n</style>", card, *losses(), *speeds(), "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(f"wrote {PICTURE.relative_to(ROOT)}")
