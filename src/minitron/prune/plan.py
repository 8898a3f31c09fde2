"""The plan: which channels, layers, groups, heads and neurons of one checkpoint stay. A file that people can edit.

`plan.json` has one line per list, and lists are written as ranges ("0-2,6-8"): it can be read, compared with `diff` and
edited; `PrunePlan.load` then checks that the result is a model of this family. Indices are those of the source, their
order is the order in the new model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..checkpoint.limits import MAX_LAYERS, CheckpointError, read_json
from ..config import ModelConfig
from ..files import write_text
from .architecture import Architecture, ArchitectureError

FORMAT = "minitron-plan-1"
MOST_INDICES = 1 << 24
"""Limit of one list: more than any axis of any model has, and few enough for memory."""


class PlanError(ValueError):
    """A plan that cannot be carried out; the message names the layer, the list and what would be right."""


@dataclass(frozen=True)
class LayerPlan:
    """What stays of one layer."""

    layer: int
    """Its index in the source."""
    groups: tuple[int, ...]
    """Key/value heads."""
    heads: tuple[int, ...]
    """Query heads, the same number for each of `groups`, group by group in that order."""
    neurons: tuple[int, ...]
    merge: tuple[tuple[int, int], ...] = ()
    """(head that stays, head of the same group that goes): the query weights of the first become twice its own less
    those of the second (the head residual of arXiv:2407.14679, section 2.3). Off unless asked for."""


@dataclass(frozen=True)
class PrunePlan:
    """What stays of a checkpoint. Checked on construction.

    Raises:
        PlanError: indices that do not exist or are listed twice; layers of unequal sizes; heads that are not the same
            number for each group; a merge with a head that stays or of another group.
    """

    source: str
    """Fingerprint of the checkpoint (`checkpoint.fingerprint`)."""
    shape: Architecture
    """Of the source."""
    channels: tuple[int, ...]
    """Of the residual stream."""
    layers: tuple[LayerPlan, ...]
    scores: str | None = None
    """Hash of the importance scores that it was made from; None for a plan made otherwise."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """Remarks on the choice; not part of the plan's hash."""

    def __post_init__(self) -> None:
        _check_indices("channels", self.channels, self.shape.hidden)
        _check_indices("layers", [layer.layer for layer in self.layers], self.shape.layers)
        for layer in self.layers:
            _check_layer(layer, self.shape)
        first = self.layers[0]
        for layer in self.layers:
            for axis in ("groups", "heads", "neurons"):
                found, expected = len(getattr(layer, axis)), len(getattr(first, axis))
                if found != expected:
                    raise PlanError(
                        f"layer {layer.layer} keeps {found} {axis}, layer {first.layer} keeps {expected}; "
                        f"all layers of this architecture are equal"
                    )

    @property
    def target(self) -> Architecture:
        """The shape of the result."""
        first = self.layers[0]
        return Architecture(
            len(self.layers), len(self.channels), len(first.heads), len(first.groups), len(first.neurons)
        )

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the plan, in hex."""
        values = {name: value for name, value in self.as_dict().items() if name != "notes"}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing is cut, moved or merged."""
        return self == keep_all(self.shape, self.source, self.scores)

    def check_config(self, config: ModelConfig, where: object) -> None:
        """Refuse a checkpoint of another shape than the plan was made for; its fingerprint is checked by surgery.

        Raises:
            PlanError: names both shapes.
        """
        found = Architecture.of(config)
        if found != self.shape:
            raise PlanError(f"the plan is for a model of {self.shape}; {where} has {found}")

    # --- the file ----------------------------------------------------------------------------------------------------

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; lists of indices as ranges."""
        layers = []
        for layer in self.layers:
            row: dict[str, Any] = {"layer": layer.layer}
            row |= {axis: to_ranges(getattr(layer, axis)) for axis in ("groups", "heads", "neurons")}
            if layer.merge:
                row["merge"] = [list(pair) for pair in layer.merge]
            layers.append(row)
        return {
            "format": FORMAT,
            "source": self.source,
            "source_shape": self.shape.as_dict(),
            "scores": self.scores,
            "channels": to_ranges(self.channels),
            "layers": layers,
            **({"notes": list(self.notes)} if self.notes else {}),
        }

    def to_json(self) -> str:
        """The text of `plan.json`."""
        return json.dumps(self.as_dict(), indent=1) + "\n"

    def save(self, path: str | Path) -> None:
        """Write `plan.json`, all or nothing."""
        write_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> PrunePlan:
        """Read and check a plan.

        Raises:
            PlanError: the file is missing, not a plan, or a plan that cannot be carried out; named with its field.
        """
        try:
            return cls.from_dict(read_json(Path(path)))
        except CheckpointError as error:
            raise PlanError(str(error)) from None
        except (PlanError, ArchitectureError) as error:
            raise PlanError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrunePlan:
        """The inverse of `as_dict`; indices may also be JSON lists."""
        if values.get("format") != FORMAT:
            raise PlanError(f"format is {values.get('format')!r}, expected {FORMAT!r}")
        known = {"format", "source", "source_shape", "scores", "channels", "layers", "notes"}
        _check_fields(values, known, "the plan")
        source, scores, rows = values.get("source"), values.get("scores"), values.get("layers")
        if not isinstance(source, str) or not isinstance(scores, str | None):
            raise PlanError("source and scores must be strings (scores may be null)")
        if not isinstance(rows, list) or not rows or len(rows) > MAX_LAYERS:
            raise PlanError("layers must be a list of at least one layer")
        notes = values.get("notes", [])
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise PlanError("notes must be a list of strings")
        shape = values.get("source_shape")
        if not isinstance(shape, dict):
            raise PlanError("source_shape is missing; expected an object with layers, hidden, heads, groups and ffn")
        return cls(
            source,
            Architecture.from_dict(shape, "source_shape"),
            parse_ranges(values.get("channels"), "channels"),
            tuple(_layer_from(row, number) for number, row in enumerate(rows)),
            scores,
            tuple(notes),
        )

    # --- for people --------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """A few lines: shapes, which layers went, and how much of each axis stays."""
        source, target = self.shape, self.target
        kept = [layer.layer for layer in self.layers]
        gone = sorted(set(range(source.layers)) - set(kept))
        lines = [f"from  {source}", f"to    {target}"]
        if gone:
            lines.append(f"removed layers: {to_ranges(gone)}")
        if kept != sorted(kept):
            lines.append(f"order of layers: {to_ranges(kept)}")
        merged = sum(len(layer.merge) for layer in self.layers)
        if merged:
            lines.append(f"query heads merged into others: {merged}")
        lines.append(f"plan {self.hash[:12]}, source {self.source[:12] or 'unknown'}")
        lines += self.notes
        return "\n".join(lines)


def diff(one: PrunePlan, two: PrunePlan) -> list[str]:
    """What `two` keeps and `one` does not (+), and the other way round (-), in source indices; empty if equal."""
    if one.shape != two.shape or one.source != two.source:
        return [
            f"the plans are for different checkpoints: {one.source[:12]} {one.shape}, {two.source[:12]} {two.shape}"
        ]
    lines = list(_difference("channels", one.channels, two.channels))
    layers = [{layer.layer: layer for layer in plan.layers} for plan in (one, two)]
    lines += _difference("layers", tuple(layers[0]), tuple(layers[1]))
    for index in sorted(set(layers[0]) & set(layers[1])):
        for axis in ("groups", "heads", "neurons"):
            pair = (getattr(side[index], axis) for side in layers)
            lines += _difference(f"layer {index} {axis}", *pair)
        if layers[0][index].merge != layers[1][index].merge:
            lines.append(f"layer {index} merge: {layers[0][index].merge} -> {layers[1][index].merge}")
    return lines


def _difference(name: str, one: tuple[int, ...], two: tuple[int, ...]) -> Iterator[str]:
    gone, come = sorted(set(one) - set(two)), sorted(set(two) - set(one))
    if gone or come:
        yield f"{name}: " + " ".join(
            f"{sign}{to_ranges(indices)} ({len(indices)})" for sign, indices in (("-", gone), ("+", come)) if indices
        )
    elif one != two:
        yield f"{name}: the same in another order"


def keep_all(shape: Architecture, source: str, scores: str | None = None) -> PrunePlan:
    """The plan that changes nothing."""
    return prefix_plan(shape, shape, source, scores)


def prefix_plan(shape: Architecture, target: Architecture, source: str, scores: str | None = None) -> PrunePlan:
    """The first of everything; of heads, the first within each of the first groups.

    On a checkpoint that was sorted by importance this is the plan that importance would make.

    Raises:
        ArchitectureError: `target` is not a part of `shape`.
    """
    target.check_within(shape)
    before, after = shape.heads // shape.groups, target.heads // target.groups
    groups = tuple(range(target.groups))
    heads = tuple(group * before + head for group in groups for head in range(after))
    neurons = tuple(range(target.ffn))
    layers = tuple(LayerPlan(layer, groups, heads, neurons) for layer in range(target.layers))
    return PrunePlan(source, shape, tuple(range(target.hidden)), layers, scores)


# --- indices as text -------------------------------------------------------------------------------------------------


def to_ranges(indices: Sequence[int]) -> str:
    """`[0, 1, 2, 6, 5]` as "0-2,6,5"; only rising runs are shortened, so that the order is kept."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_ranges(value: Any, name: str) -> tuple[int, ...]:
    """The inverse of `to_ranges`; a JSON list of numbers is taken too.

    Raises:
        PlanError: neither.
    """
    if isinstance(value, list) and all(type(index) is int for index in value):
        return tuple(value)
    if not isinstance(value, str):
        raise PlanError(f'{name} is {str(value)[:40]!r}; expected indices such as "0-2,6-8"')
    found: list[int] = []
    for part in value.split(","):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        last = last if dash else first
        if not all(text.isascii() and text.isdecimal() and len(text) < 10 for text in (first, last)):
            raise PlanError(f'{name}: {part.strip()[:40]!r} is not an index or a range; expected e.g. "0-2,6-8"')
        if int(last) < int(first):
            raise PlanError(f"{name}: the range {part.strip()} runs backwards; write its indices one by one")
        if len(found) + int(last) - int(first) >= MOST_INDICES:
            raise PlanError(f"{name}: more than {MOST_INDICES:,} indices")
        found.extend(range(int(first), int(last) + 1))
    return tuple(found)


def _layer_from(row: Any, number: int) -> LayerPlan:
    if not isinstance(row, dict) or type(row.get("layer")) is not int:
        raise PlanError(f"entry {number} of layers has no whole number 'layer'")
    where = f"layer {row['layer']}"
    _check_fields(row, {"layer", "groups", "heads", "neurons", "merge"}, where)
    pairs = row.get("merge", [])
    good = isinstance(pairs, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(head) is int for head in pair) for pair in pairs
    )
    if not good:
        raise PlanError(f"{where}: merge must be a list of pairs [head that stays, head that goes]")
    lists = [parse_ranges(row.get(axis), f"{where} {axis}") for axis in ("groups", "heads", "neurons")]
    return LayerPlan(row["layer"], *lists, merge=tuple((pair[0], pair[1]) for pair in pairs))


def _check_fields(values: dict[str, Any], known: set[str], where: str) -> None:
    strange = sorted(set(values) - known)
    if strange:
        raise PlanError(f"{where} has the unknown field {strange[0]!r}; known are {', '.join(sorted(known))}")


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_indices(name: str, indices: Sequence[int], size: int) -> None:
    if not indices:
        raise PlanError(f"{name}: nothing is kept; at least one must stay")
    wrong = [index for index in indices if type(index) is not int or not 0 <= index < size]
    if wrong:
        raise PlanError(f"{name}: {wrong[0]} does not exist; the source has 0 to {size - 1}")
    if len(set(indices)) != len(indices):
        seen: set[int] = set()
        twice = next(index for index in indices if index in seen or seen.add(index))  # type: ignore[func-returns-value]
        raise PlanError(f"{name}: {twice} is listed twice")


def _check_layer(layer: LayerPlan, shape: Architecture) -> None:
    where = f"layer {layer.layer}"
    for axis, size in (("groups", shape.groups), ("heads", shape.heads), ("neurons", shape.ffn)):
        _check_indices(f"{where} {axis}", getattr(layer, axis), size)
    per_group = shape.heads // shape.groups
    each, rest = divmod(len(layer.heads), len(layer.groups))
    if rest:
        raise PlanError(
            f"{where}: {len(layer.heads)} heads for {len(layer.groups)} groups; each group must keep the same number"
        )
    expected = [group for group in layer.groups for _ in range(each)]
    for head, group in zip(layer.heads, expected, strict=True):
        if head // per_group != group:
            raise PlanError(
                f"{where}: head {head} is of group {head // per_group} where a head of group {group} is expected; "
                f"heads are listed group by group, {each} each, in the order of groups ({to_ranges(layer.groups)})"
            )
    kept = set(layer.heads)
    _check_unique_merges(layer, where)
    for stays, goes in layer.merge:
        if stays not in kept or goes in kept or not 0 <= goes < shape.heads or stays // per_group != goes // per_group:
            raise PlanError(
                f"{where}: merge [{stays}, {goes}]: the first must stay, the second go, both of one group of "
                f"{per_group} heads"
            )


def _check_unique_merges(layer: LayerPlan, where: str) -> None:
    staying = [pair[0] for pair in layer.merge]
    if len(set(staying)) != len(staying):
        raise PlanError(f"{where}: merge names a head twice")
