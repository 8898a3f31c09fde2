"""Which architectures fit a budget: enumeration of a grid (arXiv:2407.14679, section 2.3 and Table 9).

A budget is a limit in one quantity that no candidate exceeds: at most so many parameters, parameters without
embeddings, or bytes of weights and cache; or at least so many tokens per second. Candidates come from a window on the
allowed side of it. Everything in the window is returned, small and large; `rank` chooses among them.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..config import ModelConfig
from ..dtypes import short_name
from ..shapes import Shape, describe
from .architecture import AXES, Architecture, ArchitectureError

BUDGETS = ("params", "non_embedding_params", "memory", "speed")
TOLERANCE = 0.05
"""Candidates lie at most so far from the budget, on the allowed side of it; the paper has 5% on both sides."""
BYTES_PER_VALUE = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1 + 2 / 32, "int4": 0.5 + 2 / 32}
"""Weights; the integer formats have an fp16 scale per 32 values. Keys and values are kept in 16 bits (fp32: 32)."""
_SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_NUMBER = re.compile(r"([0-9]*\.?[0-9]+(?:[eE][0-9]+)?)\s*([KMGBT]?)(I?B|TOK/S|TOKENS/S)?")


class SearchError(ValueError):
    """A budget that is malformed or cannot be met; the message says what would be right."""


@dataclass(frozen=True)
class Machine:
    """What memory and speed depend on besides the shape."""

    dtype: str = "bf16"
    """Of the weights: one of `BYTES_PER_VALUE`, or another name of it (bfloat16 is bf16)."""
    context: int = 0
    """Tokens in the cache."""
    bytes_per_second: float | None = None
    """That decoding reads: the measured bandwidth of the memory, or what a short run of the engine achieved."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", short_name(self.dtype))
        if self.dtype not in BYTES_PER_VALUE:
            raise SearchError(f"dtype is {self.dtype!r}; it must be {', '.join(BYTES_PER_VALUE)}")
        if self.context < 0:
            raise SearchError(f"context is {self.context}; it must be 0 tokens or more")

    def cache_bytes(self, config: ModelConfig | Shape) -> float:
        """Keys and values of `context` tokens."""
        return _shape(config).kv_bytes_per_token(4 if self.dtype == "fp32" else 2) * self.context

    def memory(self, config: ModelConfig | Shape) -> float:
        """Bytes of weights and cache."""
        shape = _shape(config)
        return shape.num_parameters() * BYTES_PER_VALUE[self.dtype] + self.cache_bytes(shape)

    def speed(self, config: ModelConfig | Shape) -> float | None:
        """Tokens per second if decoding did nothing but read dense weights and the cache; None without a bandwidth."""
        if self.bytes_per_second is None:
            return None
        shape = _shape(config)
        read = shape.parameters_read_per_token() * BYTES_PER_VALUE[self.dtype] + self.cache_bytes(shape)
        return self.bytes_per_second / read


@dataclass(frozen=True)
class Budget:
    """`low <= quantity <= high`, where the quantity is one of `BUDGETS`."""

    kind: str
    low: float
    high: float
    limit: bool = False
    """Whether only one end of the window is binding (`high`; `low` for a speed): if no shape is in the window, the
    nearest shapes on the allowed side are taken."""

    def __post_init__(self) -> None:
        if self.kind not in BUDGETS:
            raise SearchError(f"budget is {self.kind!r}; it must be one of {', '.join(BUDGETS)}")
        if not 0 < self.low <= self.high < math.inf:
            raise SearchError(f"{self.kind}: from {self.low} to {self.high}; expected 0 < low <= high")

    @classmethod
    def parse(cls, kind: str, text: str, tolerance: float = TOLERANCE) -> Budget:
        """A limit: "4B" parameters or "6GB" are from `tolerance` below up to that, "20tok/s" from that to it above.

        Raises:
            SearchError: not a quantity of this kind.
        """
        if not 0 <= tolerance < 1:
            raise SearchError(f"tolerance is {tolerance}; it must be from 0 up to, but not including, 1")
        value = parse_quantity(kind, text)
        if kind == "speed":
            return cls(kind, value, value * (1 + tolerance), limit=True)
        return cls(kind, value * (1 - tolerance), value, limit=True)

    def allows(self, value: float) -> bool:
        """Whether a quantity is within the limit, however far from it."""
        return value >= self.low if self.kind == "speed" else value <= self.high

    def nearest(self, value: float) -> Budget:
        """The window of the same width that begins, on the allowed side, at `value`."""
        if self.kind == "speed":
            return replace(self, low=value, high=value * (self.high / self.low))
        return replace(self, low=value * (self.low / self.high), high=value)

    def measure(self, config: ModelConfig | Shape, machine: Machine) -> float:
        """The quantity of a configuration.

        Raises:
            SearchError: a speed without a bandwidth to predict it from.
        """
        if self.kind == "params":
            return _shape(config).num_parameters()
        if self.kind == "non_embedding_params":
            return _shape(config).num_non_embedding_parameters()
        if self.kind == "memory":
            return machine.memory(config)
        speed = machine.speed(config)
        if speed is None:
            raise SearchError("a budget of speed needs the bandwidth of the machine")
        return speed

    def of(self, candidate: Candidate) -> float:
        """The quantity of a candidate, as `measure` gave it."""
        return {
            "params": candidate.parameters,
            "non_embedding_params": candidate.non_embedding_parameters,
            "memory": candidate.memory_bytes,
            "speed": candidate.tokens_per_second or 0.0,
        }[self.kind]

    def show(self, value: float) -> str:
        """A value with its unit."""
        if self.kind == "speed":
            return f"{value:.4g} tokens/s"
        unit = {"memory": "bytes", "params": "parameters"}.get(self.kind, "parameters without embeddings")
        for limit, letter in ((1e12, "T"), (1e9, "G" if unit == "bytes" else "B"), (1e6, "M"), (1e3, "k")):
            if value >= limit:
                return f"{value / limit:.2f}{letter}{'B' if unit == 'bytes' else f' {unit}'}"
        return f"{value:.0f} {unit}"

    def show_limit(self) -> str:
        """ "at most 4.00B parameters", "at least 20 tokens/s"."""
        return f"at least {self.show(self.low)}" if self.kind == "speed" else f"at most {self.show(self.high)}"


def parse_quantity(kind: str, text: str) -> float:
    """The number in "4B", "2.6B", "6GB", "20tok/s" or "4000000000".

    Raises:
        SearchError: not a quantity of this kind.
    """
    match = _NUMBER.fullmatch(text.strip().upper())
    unit = (match and match[3]) or ""
    allowed = {"memory": ("", "B", "IB"), "speed": ("", "TOK/S", "TOKENS/S")}.get(kind, ("",))
    if not match or unit not in allowed or not float(match[1]) > 0:
        example = {"memory": "6GB", "speed": "20tok/s"}.get(kind, "4B or 350M")
        raise SearchError(f"--{kind.replace('_', '-')} is {text!r}; expected something like {example}")
    if unit == "IB":
        return float(match[1]) * 1024 ** " KMGT".index(match[2] or " ")
    return float(match[1]) * _SUFFIXES[match[2]]


_ALIGNED = 8
"""Channels are kept in multiples of this where a family asks for multiples of its heads."""


# --- grids -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The shapes to look at: all combinations."""

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    groups: tuple[int, ...]
    hidden: tuple[int, ...]
    expansion: tuple[float, ...] = ()
    """MLP neurons per channel."""
    ffn: tuple[int, ...] = ()
    """MLP neurons, whatever the width."""

    @classmethod
    def around(cls, config: ModelConfig) -> Grid:
        """Shapes below any model in the manner of the paper's Table 9: layers down to nine tenths, from half of the
        heads, widths down to a quarter, MLPs of 2.5 to 4 times the width (or the same shares of the source's ratio)."""
        shape = Architecture.of(config)
        step = 1 << max(0, int(math.log2(max(1, shape.hidden // 8))))
        hidden = {*range(step, shape.hidden + 1, step), shape.hidden}
        per_group = shape.heads // shape.groups
        if per_group > 1:
            groups = (shape.groups,)
            heads = [shape.groups * each for each in range((per_group + 1) // 2, per_group + 1)]
        else:  # every head has its own keys: both go together
            groups = ()
            heads = sorted({max(1, round(shape.heads * share)) for share in (0.5, 0.625, 0.75, 0.875, 1)})
        if describe(config).family.hidden_multiple_of_heads:
            hidden |= {width // lcm * lcm for width in hidden for lcm in (math.lcm(n, _ALIGNED) for n in heads)} - {0}
        ratio = shape.ffn / shape.hidden
        return cls(
            tuple(range(math.ceil(0.9 * shape.layers), shape.layers + 1)),
            tuple(heads),
            groups,
            tuple(sorted(width for width in hidden if 4 * width >= shape.hidden)),
            tuple(ratio * part / 4 for part in (2.5, 3, 3.5, 4)),
        )

    def fixed(self, **axes: int) -> Grid:
        """The same grid with some axes at one value each.

        Raises:
            ArchitectureError: an axis that does not exist.
        """
        unknown = sorted(set(axes) - set(AXES))
        if unknown:
            raise ArchitectureError(f"unknown axis {unknown[0]!r}; expected {', '.join(AXES)}")
        changes: dict[str, Any] = {axis: (value,) for axis, value in axes.items()}
        return replace(self, **changes, **({"expansion": ()} if "ffn" in axes else {}))

    def shapes(self) -> Iterator[Architecture]:
        """Every combination once."""
        seen: set[Architecture] = set()
        for layers, heads, hidden in itertools.product(self.layers, self.heads, self.hidden):
            for groups in self.groups or (heads,):
                for ffn in (*(round(hidden * factor) for factor in self.expansion), *self.ffn):
                    shape = Architecture(layers, hidden, heads, groups, ffn)
                    if shape not in seen:
                        seen.add(shape)
                        yield shape


_EXPANSIONS = (2.5, 3.0, 3.5, 4.0)
_LAYERS = (29, 30, 31, 32)
# Table 9. Its 4680 stands for 4608, which Table 19 has. The paper says "+-5%" for both; that gives its 18 candidates
# for 4B, but its 15 for 8B (Table 19) are those from 7.87 to 8.50 billion parameters.
PAPER_GRIDS: dict[str, tuple[Grid, Budget]] = {
    "paper-8b": (
        Grid(_LAYERS, (32, 48), (8,), (4096, 4608, 5120, 5632, 6144), _EXPANSIONS),
        Budget("params", 7.87e9, 8.50e9),
    ),
    "paper-4b": (
        Grid(_LAYERS, (24, 32, 48), (8,), (2560, 3072, 3584, 4096, 4608), _EXPANSIONS),
        Budget("params", 3.8e9, 4.2e9),
    ),
}


# --- enumeration -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """An architecture within a budget, and what it costs."""

    architecture: Architecture
    parameters: int
    non_embedding_parameters: int
    memory_bytes: float
    tokens_per_second: float | None
    """Predicted from the machine's bandwidth; None where that was not measured."""

    @classmethod
    def of(cls, architecture: Architecture, source: ModelConfig, machine: Machine) -> Candidate:
        """The costs of an architecture that is cut out of `source`."""
        shape = describe(architecture.config(source))
        return cls(
            architecture,
            shape.num_parameters(),
            shape.num_non_embedding_parameters(),
            machine.memory(shape),
            machine.speed(shape),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def enumerate_architectures(
    source: ModelConfig, budget: Budget, grid: Grid | None = None, machine: Machine | None = None
) -> list[Candidate]:
    """All shapes of the grid that can be cut out of `source` and lie within the budget, by number of parameters.

    Args:
        source: of the model to prune.
        budget: window of one quantity.
        grid: shapes to look at; `Grid.around(source)` if None.
        machine: dtype and context for memory, bandwidth for speed.

    Where no shape is in the window of a limit, the shapes nearest to it on the allowed side are returned; `unused` says
    so in a sentence.

    Raises:
        SearchError: no shape of the grid can be cut out of the source, or none is within the budget; says which are
            nearest. The source itself is within a limit, so that there is nothing to cut.
    """
    machine = machine or Machine()
    here = describe(source)
    found: list[tuple[float, Architecture]] = []
    why = ""
    for shape in (grid or Grid.around(source)).shapes():
        try:
            shape.check_for(source)
        except ArchitectureError as error:
            why = why or f": {error}"
            continue
        found.append((budget.measure(_sized(shape, here), machine), shape))
    if not found:
        raise SearchError(f"no shape of the grid can be cut out of a model of {Architecture.of(source)}{why}")
    own = budget.measure(here, machine)
    if budget.limit and budget.allows(own):
        raise SearchError(
            f"the model has {budget.show(own)} itself, which is within the budget of {budget.show_limit()}; "
            f"nothing needs to be cut"
        )
    inside = _inside(budget, found)
    if not inside and budget.limit:
        allowed = [value for value, _ in found if budget.allows(value)]
        if allowed:
            best = min(allowed) if budget.kind == "speed" else max(allowed)
            inside = _inside(budget.nearest(best), found)
    if not inside:
        raise SearchError(_nearest(budget, found))
    candidates = [Candidate.of(shape, source, machine) for shape in inside]
    return sorted(candidates, key=lambda candidate: (candidate.parameters, candidate.architecture))


def unused(budget: Budget, candidates: Sequence[Candidate]) -> str | None:
    """A sentence where all candidates are farther from a limit than its tolerance; None where some are near."""
    values = [budget.of(candidate) for candidate in candidates]
    if any(budget.low <= value <= budget.high for value in values):
        return None
    best = min(values) if budget.kind == "speed" else max(values)
    return (
        f"No shape of the grid has {budget.show(budget.low)} to {budget.show(budget.high)}; the nearest within the "
        f"budget of {budget.show_limit()} has {budget.show(best)}."
    )


def _inside(budget: Budget, found: Sequence[tuple[float, Architecture]]) -> list[Architecture]:
    return [shape for value, shape in found if budget.low <= value <= budget.high]


def _sized(architecture: Architecture, source: Shape) -> Shape:
    """The shape of `architecture.config` without its checks and copies, for arithmetic on thousands of them."""
    return replace(
        source,
        layers=architecture.layers,
        hidden=architecture.hidden,
        heads=architecture.heads,
        groups=architecture.groups,
        ffn=architecture.ffn,
    )


def _shape(config: ModelConfig | Shape) -> Shape:
    return config if isinstance(config, Shape) else describe(config)


def _nearest(budget: Budget, found: Sequence[tuple[float, Architecture]]) -> str:
    below = max((pair for pair in found if pair[0] < budget.low), default=None)
    above = min((pair for pair in found if pair[0] > budget.high), default=None)
    near = " and ".join(f"{budget.show(pair[0])} ({pair[1]})" for pair in (below, above) if pair)
    window = budget.show_limit() if budget.limit else f"{budget.show(budget.low)} to {budget.show(budget.high)}"
    return f"no shape of the grid has {window}; the nearest {'have' if below and above else 'has'} {near}"


def thin_out(candidates: Sequence[Candidate], most: int) -> list[Candidate]:
    """At most `most` of the candidates, evenly spread over their sizes, the smallest and the largest among them."""
    if most < 1:
        raise SearchError(f"candidates: {most} asked for; at least 1 must be looked at")
    if len(candidates) <= most:
        return list(candidates)
    if most == 1:
        return [candidates[len(candidates) // 2]]
    return [candidates[round(i * (len(candidates) - 1) / (most - 1))] for i in range(most)]
