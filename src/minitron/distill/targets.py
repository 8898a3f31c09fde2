"""The teacher's outputs for a batch: from the teacher itself, or from a cache.

Letters of shapes: B blocks, T tokens of a block, V vocabulary, D the teacher's hidden size, K ids kept per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..data.packing import Batch
from ..families import family_of


@dataclass(frozen=True)
class DenseTargets:
    """The teacher's whole distribution, as hidden states and head."""

    hidden: Tensor
    """(B, T, D), after the last norm."""
    head: Tensor
    """(V, D)."""
    states: tuple[Tensor, ...] = ()
    """(B, T, D) for each requested layer, see `normed_states`."""


@dataclass(frozen=True)
class SparseTargets:
    """A few tokens of the teacher's distribution."""

    ids: Tensor
    """(B, T, K) int64; unused entries have share 0."""
    shares: Tensor
    """(B, T, K) fp32."""
    top: Tensor
    """(B, T) int64: the teacher's most likely token."""
    entropy: Tensor
    """(B, T) fp32, nats, of the teacher's whole distribution."""


class TeacherTargets(Protocol):
    """Where the teacher's outputs come from."""

    vocab_size: int
    hidden_size: int
    """Width of the teacher; 0 if there are no hidden states."""
    num_layers: int
    """Layers whose states are available; 0 if there are none."""

    def targets_for(self, batch: Batch, layers: Sequence[int] = ()) -> DenseTargets | SparseTargets:
        """Outputs for every position of a batch, on the device of the batch, without gradient."""
        ...


class OnlineTeacher:
    """A teacher that runs during training.

    Args:
        model: a causal language model; put into eval mode at each call, and never changed.
    """

    def __init__(self, model: nn.Module) -> None:
        config: Any = model.config
        self.model = model
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.num_layers = config.num_hidden_layers

    @torch.no_grad()
    def targets_for(self, batch: Batch, layers: Sequence[int] = ()) -> DenseTargets:
        """As of `TeacherTargets`."""
        was_training = self.model.training
        self.model.eval()
        try:
            hidden, states = hidden_states(self.model, batch, layers)
        finally:
            self.model.train(was_training)
        return DenseTargets(hidden, head_weight(self.model), states)


def head_weight(model: nn.Module) -> Tensor:
    """The LM head (V, D) of a causal language model.

    Raises:
        ValueError: the head is not just a matrix (a bias, an adapter, quantized weights).
    """
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) is not nn.Linear or head.bias is not None:
        raise ValueError(f"the LM head is {head}; distillation needs a plain linear layer without bias")
    return head.weight


def hidden_states(model: nn.Module, batch: Batch, layers: Sequence[int] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Run a model without its head: (last hidden state (B, T, D), states of `layers`)."""
    backbone: Any = model.base_model
    with normed_states(backbone, layers) as states:
        out = backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return out.last_hidden_state, tuple(states[layer] for layer in layers)


@contextmanager
def normed_states(backbone: Any, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Collect the outputs of layers, after the next norm, while the backbone runs.

    The state of layer k (from 0) is its output after the input norm of layer k + 1, or after the last norm for the
    last layer; that of -1 is the embedding after the input norm of layer 0. This is the "after layer norm" of the
    Minitron paper (2407.14679, section 2.3).

    Raises:
        ValueError: there is no such layer.
    """
    count = len(backbone.layers)
    name = family_of(backbone.config).part("attention_norm").name
    found: dict[int, Tensor] = {}
    hooks = []
    for layer in layers:
        if not -1 <= layer < count:
            raise ValueError(
                f"layer {layer} does not exist; the model has layers 0 to {count - 1}, and -1 for its input"
            )
        norm = backbone.norm if layer == count - 1 else backbone.layers[layer + 1].get_submodule(name)
        hooks.append(norm.register_forward_hook(lambda *call, layer=layer: found.__setitem__(layer, call[2])))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
