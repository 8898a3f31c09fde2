"""The folder of a run: what it contains, and whether a run that would continue in it is the same one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from ..config import ModelConfig
from ..files import is_empty, write_json
from .extending import LENGTHS, Extension, TrainError, plan_extension
from .resume import list_steps
from .schedule import TrainConfig
from .stream import Stream
from .text_changes import text_changes

__all__ = ["RUN_FILE", "OpenedRun", "TrainError", "describe", "open_run", "require_positions"]

RUN_FILE = "train.json"
TEXTS = "texts"
"""Key of the run file: where the data comes from. It explains a difference; `data` decides."""
HISTORY = "extended"
"""Key of the run file: when the run was lengthened, and from which step."""

# Settings that may change when a run continues: they change what it costs, not what it computes.
_FREE = ("recompute", "keep", "eval_every", "save_every")


def describe(
    model: nn.Module, stream: Stream, config: TrainConfig, loss: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a run is: two runs with the same description and the same machine give the same weights."""
    shape = {k: v for k, v in model.config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}  # type: ignore[operator, union-attr]
    frozen = sorted(name for name, p in model.named_parameters() if not p.requires_grad)
    description = {
        "train": asdict(config),
        "data": dict(stream.key),
        TEXTS: stream.origins,
        "model": {**shape, **({"frozen": frozen} if frozen else {})},
        "loss": dict(loss or {}),
    }
    # Through JSON, so that tuples compare equal to what is read back from the run folder.
    return json.loads(json.dumps(description, default=str))


def require_positions(model: ModelConfig, config: TrainConfig) -> None:
    """Refuse sequences longer than a model's positions.

    Raises:
        TrainError: they are.
    """
    limit = model.max_position_embeddings
    if config.sequence > limit:
        raise TrainError(f"sequence is {config.sequence}; the model's max_position_embeddings is {limit}")


@dataclass(frozen=True)
class OpenedRun:
    """A run folder that passed all checks; nothing is written to it before `begin`."""

    run: Path
    description: dict[str, Any]
    extension: Extension | None = None

    @property
    def notes(self) -> list[str]:
        """Sentences about what a lengthened run keeps."""
        return [self.extension.note] if self.extension else []

    def begin(self) -> None:
        """Create the folder, or turn it into that of the longer run."""
        self.run.mkdir(parents=True, exist_ok=True)
        if self.extension is not None:
            self.extension.rewind(self.run)
        write_json(self.run / RUN_FILE, self.description)


def open_run(run: Path, description: Mapping[str, Any], extend: bool = False) -> OpenedRun:
    """Check whether a run can begin or continue in a folder; nothing is changed.

    A run without a checkpoint has nothing to lose, so it starts over, with other settings too.

    Args:
        run: the folder.
        description: what the run is, from `describe`.
        extend: whether a run that differs only in its length may be lengthened.

    Raises:
        TrainError: it holds another run, or is not a run folder, or cannot be lengthened.
    """
    path = run / RUN_FILE
    if not path.exists():
        if run.exists() and (not run.is_dir() or not is_empty(run)):
            raise TrainError(
                f"{run} is not empty and is not the folder of a run (no {RUN_FILE}); choose another folder"
            )
        if extend:
            raise TrainError(f"{run} holds no run that could be lengthened; to begin one, drop --extend")
        return OpenedRun(run, dict(description))
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainError(f"{path}: cannot be read ({error})") from None
    history = before.pop(HISTORY, [])
    kept = {**description, **({HISTORY: history} if history else {})}
    if not list_steps(run):
        return OpenedRun(run, dict(description))
    differing = _differences(before, description)
    if not differing:
        return OpenedRun(run, kept)
    if not set(differing) <= {f"train {name}" for name in LENGTHS}:
        raise TrainError(
            f"{run} holds another run; choose another folder or the same settings: {'; '.join(differing.values())}"
        )
    extension = plan_extension(run, before["train"], description["train"], extend)
    return OpenedRun(run, {**kept, HISTORY: [*history, extension.record]}, extension)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Differences by part and name; each is a clause with both values."""
    out = {}
    # A setting that is newer than the run had its default then.
    defaults = {"train": {f.name: f.default for f in fields(TrainConfig)}}
    if before.get("data") != now.get("data"):
        changes = text_changes(before.get(TEXTS), now[TEXTS])
        out["data"] = f"the text is not the same ({changes or 'which file changed was not written down'})"
    for part in sorted({*before, *now} - {"data", TEXTS}):
        old, new = {**defaults.get(part, {}), **before.get(part, {})}, now.get(part, {})
        free = _FREE if part == "train" else ()
        for key in sorted({*old, *new}):
            if key not in free and old.get(key) != new.get(key):
                out[f"{part} {key}"] = f"{part} {key} was {old.get(key)!r}, is {new.get(key)!r}"
    return out
