"""The five numbers that pruning changes, and what a model of these numbers costs.

Vocabulary, `head_dim`, rotary embedding, biases and tying stay those of the source: `Architecture.config` keeps them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ..config import ModelConfig
from ..shapes import describe

AXES = ("layers", "hidden", "heads", "groups", "ffn")


class ArchitectureError(ValueError):
    """A shape that cannot be cut out of the source; the message names the axis and what would be right."""


@dataclass(frozen=True, order=True)
class Architecture:
    """A shape of the family, in the order of the paper's Table 19 (layers, heads, MLP, embedding) plus groups."""

    layers: int
    hidden: int
    heads: int
    groups: int
    """Key/value heads."""
    ffn: int
    """Neurons of the MLP."""

    @classmethod
    def of(cls, config: ModelConfig) -> Architecture:
        """The shape of a configuration."""
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.intermediate_size,
        )

    @classmethod
    def parse(cls, text: str, source: ModelConfig) -> Architecture:
        """`heads=24,ffn=9216,hidden=3072,layers=32`; axes that are not named keep the value of the source.

        Where every query head has its own key/value head, `groups` follows `heads`.

        Raises:
            ArchitectureError: not of this form, an unknown axis, or a shape that cannot be cut out of `source`.
        """
        given = parse_axes(text)
        here = cls.of(source)
        if here.heads == here.groups and "heads" in given:
            given.setdefault("groups", given["heads"])
        found = replace(here, **given)
        found.check_for(source)
        return found

    def config(self, source: ModelConfig) -> ModelConfig:
        """The configuration of `source` in this shape. `head_dim` is explicit: it no longer follows from the rest.

        Raises:
            ArchitectureError: see `check_for`.
        """
        self.check_for(source)
        values = {
            **source.to_dict(),
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "intermediate_size": self.ffn,
            "head_dim": describe(source).head_dim,
        }
        if values.get("layer_types") is not None:  # all layers are of one kind
            values["layer_types"] = values["layer_types"][: self.layers]
        return type(source).from_dict(values)

    def check_for(self, source: ModelConfig) -> None:
        """Refuse a shape that cannot be cut out of a model, or that the classes of its family cannot load.

        Raises:
            ArchitectureError: names the axis, its value and what would be right.
        """
        self.check_within(Architecture.of(source))
        family = describe(source).family
        if family.hidden_multiple_of_heads and self.hidden % self.heads:
            below = self.hidden // self.heads * self.heads
            good = " or ".join(f"hidden={n}" for n in (below, below + self.heads) if 0 < n <= source.hidden_size)
            raise ArchitectureError(
                f"hidden is {self.hidden}, not a multiple of heads ({self.heads}), and transformers loads no such "
                f"{family.title} model; {good} would do"
            )

    def check_within(self, source: Architecture) -> None:
        """Refuse a shape that is not a part of `source`.

        Raises:
            ArchitectureError: names the axis, its value and what would be right.
        """
        for axis in AXES:
            value, most = getattr(self, axis), getattr(source, axis)
            if type(value) is not int or not 1 <= value <= most:
                raise ArchitectureError(f"{axis} is {value!r}; it must be from 1 to {most}, which the source has")
        if self.heads % self.groups:
            below = self.heads // self.groups * self.groups
            good = " or ".join(str(n) for n in (below, below + self.groups) if 0 < n <= source.heads)
            raise ArchitectureError(
                f"heads is {self.heads}, not a multiple of groups ({self.groups}): every key/value head serves the "
                f"same number of query heads; heads={good} would do"
            )
        per_group, most = self.heads // self.groups, source.heads // source.groups
        if per_group > most:
            raise ArchitectureError(
                f"heads={self.heads} in groups={self.groups} is {per_group} query heads per key/value head, the source "
                f"has {most}; heads={most * self.groups} is the most"
            )

    def as_dict(self) -> dict[str, int]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Architecture:
        """The inverse of `as_dict`.

        Raises:
            ArchitectureError: an axis is missing or not a whole number.
        """
        wrong = [axis for axis in AXES if type(dict(values).get(axis)) is not int]
        if wrong:
            raise ArchitectureError(f"{where}: {wrong[0]} is missing or not a whole number")
        return cls(**{axis: values[axis] for axis in AXES})

    def __str__(self) -> str:
        return f"{self.layers} layers, hidden {self.hidden}, {self.heads} heads in {self.groups} groups, MLP {self.ffn}"


def parse_axes(text: str) -> dict[str, int]:
    """The numbers of `heads=24,ffn=9216`.

    Raises:
        ArchitectureError: an unknown or repeated axis, or no whole number.
    """
    found: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in AXES:
            raise ArchitectureError(f"{part!r}: unknown axis {name!r}; expected {', '.join(AXES)}, as in heads=24")
        if name in found:
            raise ArchitectureError(f"{text!r}: {name} is given twice")
        if not value.isascii() or not value.isdecimal() or len(value) > 9:
            raise ArchitectureError(f"{part!r}: {value!r} is not a whole number; expected something like {name}=24")
        found[name] = int(value)
    if not found:
        raise ArchitectureError(f"{text!r}: no axis in it; expected something like heads=24,ffn=9216")
    return found
