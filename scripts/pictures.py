"""Draw every picture of the README and the documents again.

    python scripts/pictures.py [--check]

All are SVG made from text, follow the reader's light or dark theme, and are the same on every machine. `--check` writes
nothing and fails if a file differs. The recording of the terminal shows what commands printed: `--record` runs them
again and stores it in `docs/pictures/terminal.json`.
"""

from __future__ import annotations

import argparse
import html
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import readme_picture

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pictures"
RECORDED = FOLDER / "terminal.json"

STYLE = """
text { font: 14px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: #1f2328 }
.bold { font-weight: 600 } .small { font-size: 12px; fill: #59636e } .code { font: 13px ui-monospace, Menlo, monospace }
.box { fill: #f6f8fa; stroke: #8c959f } .hot { fill: #ddf4ff; stroke: #0969da } .cold { fill: #ffffff; stroke: #d0d7de }
.warm { fill: #fff1e5; stroke: #bc4c00 }
.arrow { fill: none; stroke: #59636e; stroke-width: 1.5 } .head { fill: #59636e }
.screen { fill: #0d1117 } .screen-text { fill: #e6edf3 } .prompt { fill: #7ee787 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .small { fill: #9198a1 } .box { fill: #161b22; stroke: #6e7681 }
  .hot { fill: #0c2d6b; stroke: #58a6ff }
  .cold { fill: #0d1117; stroke: #30363d } .warm { fill: #3d1d00; stroke: #f0883e }
  .arrow { stroke: #9198a1 } .head { fill: #9198a1 }
}"""


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """A whole picture. `title` is what a screen reader says."""
    marker = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0,0 L8,4 L0,8 z" class="head"/></marker></defs>'
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{STYLE}</style>",
            marker,
            *parts,
            "</svg>",
            "",
        ]
    )


def words(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{html.escape(text)}</text>'


def box(x: float, y: float, width: float, height: float, lines: tuple[str, ...] = (), kind: str = "box") -> str:
    """A box with lines of text in its middle; the first is bold, the others small."""
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" class="{kind}"/>']
    top = y + height / 2 - 9 * (len(lines) - 1) + 5
    for number, line in enumerate(lines):
        parts.append(words(x + width / 2, top + 18 * number, line, "small" if number else "bold", "middle"))
    return "".join(parts)


def arrow(x1: float, y1: float, x2: float, y2: float, label: str = "") -> str:
    """A straight arrow, with small words above its middle."""
    drawn = f'<path d="M{x1:g},{y1:g} L{x2:g},{y2:g}" class="arrow" marker-end="url(#head)"/>'
    return drawn + (words((x1 + x2) / 2, (y1 + y2) / 2 - 6, label, "small", "middle") if label else "")


def recipe() -> str:
    """The Minitron recipe."""
    parts = [
        box(10, 70, 130, 70, ("trained model", "the teacher"), "hot"),
        box(190, 10, 150, 60, ("importance", "one forward pass")),
        box(190, 140, 150, 60, ("candidates", "shapes in the budget")),
        box(390, 75, 130, 60, ("rank", "short retraining")),
        box(570, 75, 130, 60, ("cut", "and compensate")),
        box(750, 75, 120, 60, ("distill", "by the teacher")),
        box(750, 175, 120, 60, ("small model", "same format"), "hot"),
        arrow(140, 90, 190, 45),
        arrow(140, 120, 190, 165),
        arrow(340, 45, 390, 90),
        arrow(340, 165, 390, 120),
        arrow(520, 105, 570, 105),
        arrow(700, 105, 750, 105),
        arrow(810, 135, 810, 175),
        '<path d="M75,140 L75,225 L725,225 L725,120 L750,120" class="arrow" marker-end="url(#head)"/>',
        words(400, 219, "the teacher's distribution of every next token", "small", "middle"),
    ]
    return svg(880, 245, "The recipe: importance, candidates, ranking, cut, distillation by the teacher", parts)


def architecture() -> str:
    """The floors of the package."""
    floors = (
        ("command line", "cli"),
        ("recipe, server, reports", "compress  serve  tune  distill  curate  evaluate  report  doctor"),
        ("running, training, cutting", "engine  train  prune  light  bench"),
        ("model and checkpoints", "model  heads  cache  checkpoint"),
        ("mathematics and text", "ops  data  tokenizer  chat"),
        ("shapes, families, files", "config  families  files  memory"),
    )
    parts = []
    for number, (title, rooms) in enumerate(floors):
        y = 10 + 52 * number
        parts += [
            box(10, y, 860, 44, kind="hot" if number == 0 else "box"),
            words(26, y + 27, title, "bold"),
            words(270, y + 27, rooms, "code"),
        ]
    parts.append(
        words(440, 340, "A file imports files of its own floor or of a lower one; a test checks it.", "small", "middle")
    )
    return svg(880, 350, "The floors of the package, from the command line down to shapes and files", parts)


def zero_skipping() -> str:
    """Squared ReLU and the rows of down_proj that are read."""
    active = (0, 1, 0, 0, 1, 0, 0, 0, 1, 0)
    parts = [
        words(10, 24, "up_proj gives", "small"),
        words(10, 42, "a value per neuron", "small"),
        words(200, 24, "squared ReLU:", "small"),
        words(200, 42, "most are exactly 0", "small"),
        words(480, 24, "down_proj, a row of weights per neuron", "small"),
        words(480, 42, "(only the coloured rows are read)", "small"),
    ]
    values = (-0.7, 0.6, -0.2, -1.1, 1.2, -0.4, -0.9, -0.1, 0.8, -0.3)
    for number, (on, value) in enumerate(zip(active, values, strict=True)):
        y = 56 + 23 * number
        parts += [
            box(40, y, 70, 19, kind="cold"),
            words(75, y + 14, f"{value:.1f}", "code", "middle"),
            arrow(112, y + 9.5, 226, y + 9.5),
            box(230, y, 70, 19, kind="warm" if on else "cold"),
            words(265, y + 14, f"{max(value, 0) ** 2:.2f}" if on else "0", "code", "middle"),
            box(400, y, 460, 19, kind="warm" if on else "cold"),
        ]
        if on:
            parts.append(arrow(302, y + 9.5, 396, y + 9.5))
    return svg(880, 300, "Zero skipping: rows of down_proj whose neuron is zero are not read", parts)


def prefix_cache() -> str:
    """Chunks of prompts that share a beginning."""
    parts = [words(10, 24, "chunks of 32 prompt tokens", "small")]
    for row, (name, shared, own, note) in enumerate(
        (
            ("first request", 0, 5, "computes all chunks and keeps them"),
            ("second turn", 5, 2, "copies five chunks, computes two"),
            ("other question", 3, 2, "copies the three chunks of the same system prompt"),
        )
    ):
        y = 40 + 62 * row
        parts.append(words(10, y + 25, name, "bold"))
        for chunk in range(shared + own):
            kind = "hot" if chunk < shared else "warm"
            parts.append(box(150 + 62 * chunk, y, 56, 38, (str(chunk),), kind))
        parts.append(words(150 + 62 * (shared + own) + 8, y + 24, note, "small"))
    parts += [
        box(150, 232, 26, 16, kind="hot"),
        words(184, 245, "copied from the cache", "small"),
        box(350, 232, 26, 16, kind="warm"),
        words(384, 245, "computed", "small"),
    ]
    return svg(880, 262, "The prefix cache keeps whole chunks and copies those of the same beginning", parts)


def packing() -> str:
    """Documents in blocks, and who sees whom."""
    lengths = ((5, 3), (4, 4), (8,), (6, 2))
    parts = [words(10, 24, "documents, packed by best fit into blocks of the same length", "small")]
    number = 0
    for row, block in enumerate(lengths):
        x = 10.0
        for length in block:
            number += 1
            label = (f"document {number}",) if length > 2 else (str(number),)
            parts.append(box(x, 38 + 44 * row, 54 * length - 4, 34, label, "hot" if number % 2 else "warm"))
            x += 54 * length
    parts += [
        words(560, 24, "attention in the first block: each document sees itself", "small"),
        *(
            box(
                560 + 20 * column, 38 + 20 * line, 18, 18,
                kind="hot" if column <= line < 5 else "warm" if 5 <= column <= line else "cold",
            )
            for line in range(8) for column in range(8)
        ),
    ]  # fmt: skip
    return svg(880, 222, "Packing: documents share a block and do not see each other", parts)


def exact_loss() -> str:
    """The loss over a large vocabulary in chunks of tokens."""
    parts = [
        words(10, 24, "plain: all logits at once", "bold"),
        box(10, 40, 70, 150, ("hidden", "tokens x D"), "hot"),
        arrow(80, 115, 110, 115),
        box(114, 40, 250, 150, ("logits", "tokens x 256,000", "most of a step's memory"), "warm"),
        words(430, 24, "here: chunk by chunk, gradients formed at once", "bold"),
        *(box(430, 40 + 38 * i, 70, 34, kind="hot") for i in range(4)),
        arrow(502, 95, 536, 95),
        box(540, 78, 150, 34, ("logits of a chunk",), "warm"),
        arrow(692, 95, 726, 95),
        box(730, 40, 140, 44, ("loss", "summed in fp32"), "box"),
        box(730, 94, 140, 44, ("gradient of hidden", "of this chunk"), "box"),
        box(730, 148, 140, 44, ("gradient of the head", "added up"), "box"),
    ]
    return svg(880, 210, "The loss over a large vocabulary without the logits of all tokens", parts)


COMMANDS = (
    "minitron generate -p 'Once upon a time' -n 40 --seed 1",
    "minitron inspect minitron-4b",
    "minitron prune bundled runs/small --params 3.5M --samples 16 --no-measure --quiet",
)


def record() -> None:
    """Run the commands and store what they print on stdout."""
    import shlex
    import tempfile

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for command in COMMANDS:
            words_of = [sys.executable, "-m", *shlex.split(command)]
            done = subprocess.run(words_of, cwd=folder, capture_output=True, text=True, check=True)
            rows.append({"command": command, "output": done.stdout.rstrip().splitlines()})
    RECORDED.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def terminal() -> str:
    """What the commands printed, appearing line by line, and again from the start."""
    rows = json.loads(RECORDED.read_text(encoding="utf-8"))
    lines: list[tuple[str, str]] = []
    for row in rows:
        lines.append(("prompt", f"$ {row['command']}"))
        for output in row["output"][:12]:
            lines += [("screen-text", output[at : at + 104]) for at in range(0, max(1, len(output)), 104)]
        lines.append(("screen-text", ""))
    height = 24 + 18 * len(lines)
    parts = [f'<rect width="880" height="{height}" rx="8" class="screen"/>']
    seconds = 0.4 * len(lines) + 6
    for number, (kind, line) in enumerate(lines):
        at = 0.4 * number / seconds
        move = (
            f'<animate attributeName="opacity" dur="{seconds:g}s" repeatCount="indefinite" '
            f'values="0;0;1;1" keyTimes="0;{at:.4f};{min(at + 0.001, 1):.4f};1"/>'
        )
        text = html.escape(line)
        parts.append(
            f'<text x="16" y="{30 + 18 * number}" class="code {kind}" xml:space="preserve">{text}{move}</text>'
        )
    return svg(880, height, "A recording of three commands: generate, inspect and prune", parts)


PICTURES: dict[Path, Callable[[], str]] = {
    readme_picture.PICTURE: readme_picture.picture,
    **{
        FOLDER / f"{name}.svg": draw
        for name, draw in {
            "recipe": recipe,
            "architecture": architecture,
            "zero-skipping": zero_skipping,
            "prefix-cache": prefix_cache,
            "packing": packing,
            "exact-loss": exact_loss,
            "terminal": terminal,
        }.items()
    },
}


def main() -> int:
    """Write the pictures, or say which differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file differs")
    parser.add_argument("--record", action="store_true", help="run the commands of the terminal's recording again")
    given = parser.parse_args()
    if given.record:
        record()
    different = []
    for path, draw in PICTURES.items():
        drawn = draw()
        if given.check and (not path.exists() or path.read_text(encoding="utf-8") != drawn):
            different.append(str(path.relative_to(ROOT)))
        elif not given.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(drawn, encoding="utf-8")
    if different:
        print(f"differ from what the script draws: {', '.join(different)}; run python scripts/pictures.py")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
