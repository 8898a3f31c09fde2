"""The folder of a run: what it holds, and whether a run that wants to continue there is the same one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from torch import nn

from ..data import BlockStream
from .schedule import TrainConfig

RUN_FILE = "train.json"

# Settings that a run may change when it continues: they decide what it costs, not what it computes.
_FREE = ("recompute", "keep", "eval_every", "save_every")


class TrainError(ValueError):
    """A run that cannot start or go on."""


def describe(
    model: nn.Module, stream: BlockStream, config: TrainConfig, loss: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a run is: two runs with the same description and the same machine give the same weights."""
    shape = {k: v for k, v in model.config.to_dict().items() if k not in ("transformers_version", "_name_or_path")}  # type: ignore[operator, union-attr]
    data = {s.cache.key[:16]: w for s, w in zip(stream.sources, stream.weights, strict=True)}
    frozen = sorted(name for name, p in model.named_parameters() if not p.requires_grad)
    description = {
        "train": asdict(config),
        "data": data,
        "model": {**shape, **({"frozen": frozen} if frozen else {})},
        "loss": dict(loss or {}),
    }
    # Through JSON, so that tuples compare equal to what is read back from the run folder.
    return json.loads(json.dumps(description, default=str))


def open_run(run: Path, description: Mapping[str, Any]) -> None:
    """Make a run folder, or make sure that an existing one is of the same run.

    Raises:
        TrainError: it is of another run, or is no run folder.
    """
    path = run / RUN_FILE
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TrainError(f"{path}: cannot be read ({error})") from None
        differing = _differences(before, description)
        if differing:
            raise TrainError(f"{run} holds another run; choose another folder or the same settings: {differing}")
        return
    if run.exists() and any(run.iterdir()):
        raise TrainError(f"{run} is not empty and is not the folder of a run (no {RUN_FILE}); choose another folder")
    run.mkdir(parents=True, exist_ok=True)
    work = path.with_suffix(".tmp")
    work.write_text(json.dumps(description, indent=1), encoding="utf-8")
    work.replace(path)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    out = []
    # A setting that is newer than the run had its default then.
    defaults = {"train": {f.name: f.default for f in fields(TrainConfig)}}
    for part in sorted({*before, *now}):
        old, new = {**defaults.get(part, {}), **before.get(part, {})}, now.get(part, {})
        free = _FREE if part == "train" else ()
        for key in sorted({*old, *new}):
            if key not in free and old.get(key) != new.get(key):
                out += [f"{part} {key} was {old.get(key)!r}, is {new.get(key)!r}"]
    return "; ".join(out)
