"""What a forward pass yields for scoring: statistics of every prunable unit, layer by layer.

Where a unit's activation is taken follows P1 (arXiv 2407.14679, section 2.2): a query head by the L2 norm of its
output before `o_proj`; a neuron before the activation, as P1 prints it (of a gated MLP: at the output of the gate), or
at the input of `down_proj`, as NVIDIA's Model-Optimizer does (of a gated MLP: the product with the gate); a channel at
the output of every norm of the residual stream, gain and offset included. A key/value head counts as the L2 norm over
all the query heads it serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..families import Role
from .scores import Scores
from .statistics import Aggregation, Moments, over_tokens
from .streaming import Step, StreamError

NEURON_SITES = ("before", "after")
"""Where neurons are scored: before the activation function, or after it at the input of the down projection."""


@dataclass
class LayerStatistics:
    """Moments of one layer's units, and how much layers that end here turn the residual stream."""

    moments: dict[str, Moments] = field(default_factory=dict)
    """heads (N), groups (K), before (F), after (F), input_norm (D), post_norm (D)."""
    influence: dict[int, float] = field(default_factory=dict)
    """Number of layers n to the sum over tokens of 1 - cos(input of the first, output of the last)."""

    def add(self, name: str, values: Tensor, where: str) -> None:
        """Count one sample (T, units); `where` names it in errors.

        Raises:
            StreamError: a value is not finite.
        """
        sample = over_tokens(values)
        if not torch.isfinite(sample).all():
            unit = int((~torch.isfinite(sample)).any(0).nonzero()[0])
            raise StreamError(f"{where}: NaN or infinity (unit {unit}); the weights are damaged or overflow")
        if name not in self.moments:
            self.moments[name] = Moments(sample.shape[1])
        self.moments[name].add(sample)

    def __add__(self, other: LayerStatistics) -> LayerStatistics:
        """The statistics of both sets of samples."""
        moments = {name: ours + other.moments[name] for name, ours in self.moments.items()}
        return LayerStatistics(moments, {n: turned + other.influence[n] for n, turned in self.influence.items()})

    def state(self) -> dict[str, Tensor]:
        """Tensors that `from_state` reads."""
        tensors: dict[str, Tensor] = {}
        for name, moments in self.moments.items():
            tensors |= moments.state(name)
        for length, turned in self.influence.items():
            tensors[f"influence.{length}"] = torch.tensor([turned], dtype=torch.float64)
        return tensors

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor]) -> LayerStatistics:
        """The statistics that `state` wrote."""
        names = sorted({name.split(".")[0] for name in tensors} - {"influence"})
        turned = {int(n.split(".")[1]): float(x) for n, x in tensors.items() if n.startswith("influence.")}
        return cls({name: Moments.from_state(tensors, name) for name in names}, turned)


@dataclass
class Statistics:
    """The result of one pass over calibration blocks, from which scores by any pair of aggregations follow."""

    layers: list[LayerStatistics]
    final_norm: LayerStatistics
    tokens: int
    """Tokens that were counted."""
    about: dict[str, Any]

    def __add__(self, other: Statistics) -> Statistics:
        """The statistics of both sets of samples, of the same model."""
        pairs = zip([*self.layers, self.final_norm], [*other.layers, other.final_norm], strict=True)
        *layers, final = [ours + theirs for ours, theirs in pairs]
        return Statistics(layers, final, self.tokens + other.tokens, dict(self.about))

    def scores(
        self, batch: Aggregation = "l2", sequence: Aggregation = "mean", neurons: str = "after", **about: Any
    ) -> Scores:
        """Scores by one pair of aggregations; see `statistics`.

        Args:
            batch, sequence: how samples, and tokens within a sample, are aggregated.
            neurons: "before" or "after" the activation.
            **about: more to record about them.
        """
        if neurons not in NEURON_SITES:
            raise ValueError(f"neurons are scored {neurons!r}; it must be one of {', '.join(NEURON_SITES)}")

        def per_layer(name: str) -> list[Tensor]:
            return [layer.moments[name].score(batch, sequence) for layer in self.layers]

        # Channels have one ranking: the sum over all norms, that before the LM head included.
        norms = [*per_layer("input_norm"), *per_layer("post_norm")]
        norms.append(self.final_norm.moments["norm"].score(batch, sequence))
        lengths = sorted(self.layers[-1].influence)
        turned = {
            n: torch.tensor([layer.influence[n] / self.tokens for layer in self.layers[n - 1 :]], dtype=torch.float64)
            for n in lengths
        }
        return Scores(
            heads=per_layer("heads"),
            groups=per_layer("groups"),
            neurons=per_layer(neurons),
            channels=torch.stack(norms).sum(0),
            layers=turned.pop(1),
            windows=turned,
            about={**self.about, "aggregation": [batch, sequence], "neurons": neurons, "tokens": self.tokens, **about},
        )


@contextmanager
def watching(step: Step, counts: Sequence[int], into: LayerStatistics) -> Iterator[None]:
    """Count the activations of the whole model's stream in a layer while the `with` block runs.

    Args:
        step: the layer.
        counts: tokens of each calibration block; what follows is padding.
        into: where they are counted.
    """
    model = step.walk.model
    heads, groups, head_dim = model.shape.heads, model.shape.groups, model.shape.head_dim

    def module(role: Role) -> Any:
        return model.module(step.layer, role)

    def samples(values: Tensor) -> Iterator[Tensor]:
        # Other streams of the walk go through the same layer; they are not watched.
        for row, block in enumerate(step.watched or ()):
            if counts[block]:
                yield values[row, : counts[block]]

    def count(name: str, values: Tensor, what: str) -> None:
        for sample in samples(values):
            into.add(name, sample, f"layer {step.index}, {what}")

    def count_heads(values: Tensor) -> None:
        for sample in samples(values):
            wide = sample if sample.dtype == torch.float64 else sample.float()
            norms = torch.linalg.vector_norm(wide.view(-1, heads, head_dim), dim=-1)
            into.add("heads", norms, f"layer {step.index}, output of the attention heads")
            grouped = torch.linalg.vector_norm(norms.view(-1, groups, heads // groups), dim=-1)
            into.add("groups", grouped, f"layer {step.index}, output of the attention heads")

    def last(role: Role) -> str:
        return model.shape.family.part(role).name.rpartition(".")[2]

    def watch_output(role: Role, name: str) -> Any:
        what = f"output of {last(role)}"
        return module(role).register_forward_hook(lambda _, args, out: count(name, out, what))

    def watch_input(role: Role, into_function: Callable[[Tensor], None]) -> Any:
        return module(role).register_forward_pre_hook(lambda _, args: into_function(args[0]))

    activated: Role = "gate" if model.shape.family.gated else "up"
    hooks = [
        watch_output("attention_norm", "input_norm"),
        watch_input("output", count_heads),
        watch_output("mlp_norm", "post_norm"),
        watch_output(activated, "before"),
        watch_input("down", lambda x: count("after", x, f"input of {last('down')}")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def turning(before: Tensor, after: Tensor, counts: Sequence[int]) -> float:
    """Sum over the tokens of some blocks of `1 - cos(before, after)`: Block Influence, ShortGPT (arXiv 2403.03853).

    Args:
        before, after: (B, T, D).
        counts: tokens of each block.
    """
    similarity = F.cosine_similarity(before, after, dim=-1)
    return sum(float((1 - row[:count]).double().sum()) for row, count in zip(similarity, counts, strict=True))
