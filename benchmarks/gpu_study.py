"""The last step of `gpu.py`: for whatever time is left, a model of 75 million parameters learns from text.

It is the one step whose numbers say something about a model: held-out loss against tokens, by `minitron train` with its
own defaults. Text is the folder that MINITRON_DATA names, or else the example of the repository, which is too short
for a model of this size.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu import Place

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "black_beauty.jsonl"
SHAPE = {"layers": 12, "hidden-size": 768, "intermediate-size": 3072, "heads": 12, "kv-heads": 4}
TINY = {"layers": 2, "hidden-size": 32, "intermediate-size": 64, "heads": 2, "kv-heads": 1}
START_SECONDS = 60
"""Of the step, for reading text and for the last held-out loss."""
LEAST_SECONDS = 30
"""Of training, below which nothing is learned that is worth a line."""


def study(place: Place) -> None:
    """Train until the step's time is nearly over; record the held-out loss after each number of tokens."""
    seconds = place.limit - START_SECONDS
    if not place.smoke and seconds < LEAST_SECONDS:
        place.record("skipped", {"reason": f"{place.limit:.0f} s are left; it takes {START_SECONDS + LEAST_SECONDS}"})
        return
    books = Path(os.environ.get("MINITRON_DATA", "")) / "books"
    text = EXAMPLE if place.smoke or not books.is_dir() else books
    run, shape = place.file.with_name("study"), TINY if place.smoke else SHAPE
    shutil.rmtree(run, ignore_errors=True)  # of an earlier run of this script
    length = ["--steps", "2", "--warmup", "1"] if place.smoke else ["--hours", str(seconds / 3600)]
    batch = place.pick(128, 2)
    sequence = place.pick(512, 64)
    command = [
        *(sys.executable, "-m", "minitron", "train", "--data", str(text), "--heldout-share", "0.02"),
        *(part for name, value in shape.items() for part in (f"--{name}", str(value))),
        *("--tokenizer", "bundled", "--batch", str(batch), "--sequence", str(sequence), "--lr", "1e-3", *length),
        *("--eval-every", str(place.pick(200, 1)), "--save-every", "0", "--device", place.device, "--out", str(run)),
    ]
    code = subprocess.run(command, check=False).returncode
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()] if metrics.is_file() else []
    place.record("text", {"folder": text.name, "tokens_per_step": batch * sequence, "parameters": shape})
    place.record("steps", {"done": max((row["step"] for row in rows), default=0), "exit_code": code})
    place.record("heldout", [row for row in rows if "heldout" in json.dumps(row)])
    speeds = sorted(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
    if speeds:
        place.record("training", {"tokens_per_s": speeds[len(speeds) // 2]})
    if code:
        raise SystemExit(f"minitron train ended with exit code {code}")
