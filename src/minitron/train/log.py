"""The log of a run: a line of JSON per measurement, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from ..files import write_text, writing
from ..quiet import bar_class

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Writes metrics of a run; a resumed run drops the lines after the step it resumes from.

    Args:
        run: the run folder; `metrics.jsonl` and the folder `tensorboard` go there.
        step: the step that the run continues from.
        done: share of the run that is over, for the progress bar.
        quiet: no progress bar.
        first: whether this process writes and prints; of many only one does.
    """

    def __init__(self, run: Path, step: int, done: float, quiet: bool, first: bool = True) -> None:
        self.note: str | None = None
        self._board: Any = None
        self._bar: Any = None
        self._sink: Any = None
        self._last_flush = 0.0
        self._path = run / METRICS_FILE
        if not first:
            return
        if self._path.exists():
            _keep_until(self._path, step)
        with writing(self._path):
            self._sink = self._path.open("a", encoding="utf-8")
        try:
            from torch.utils.tensorboard import SummaryWriter  # heavy, and an extra
        except ImportError:
            self.note = "tensorboard is not installed, so only metrics.jsonl is written: pip install 'minitron[train]'"
        else:
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)
        bar, watched = bar_class()
        self._bar = bar(
            total=1.0,
            initial=done,
            disable=quiet,
            bar_format="{percentage:5.1f}% |{bar}| {desc}",
            mininterval=0.2 if watched else 30,
            dynamic_ncols=watched,
        )

    def write(self, step: int, values: dict[str, float]) -> None:
        """Record numbers of a step."""
        if self._sink is None:
            return
        with writing(self._path):
            self._sink.write(json.dumps({"step": step, **values}) + "\n")
        if time.monotonic() - self._last_flush > 1:
            self.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def show(self, done: float, text: str) -> None:
        """Move the progress bar."""
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(done - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line beside the progress bar, to stderr."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)

    def flush(self) -> None:
        """Pass everything to the operating system."""
        if self._sink is not None:
            with writing(self._path):
                self._sink.flush()
        self._last_flush = time.monotonic()

    def close(self) -> None:
        """Close files and bar."""
        if self._sink is not None:
            self._bar.close()
            with writing(self._path):
                self._sink.close()
        if self._board is not None:
            self._board.close()


def _keep_until(path: Path, step: int) -> None:
    kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if _step_of(line) <= step]
    write_text(path, "".join(kept))


def _step_of(line: str) -> float:
    try:
        row: Any = json.loads(line)
        return row["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # truncated by a crash


def clock(seconds: float) -> str:
    """A duration as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
