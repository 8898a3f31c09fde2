"""The output of the causal language model: the positions whose logits are kept, and logits computed when read."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, ValuesView
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


class _Deferred:
    """Logits that are computed when they are read."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute = compute


class DeferredLogitsOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` whose `logits` are computed on first reading, in whatever way they are read.

    With a vocabulary of 256,000 the logits are most of a training step's memory, and a training loop reads only
    `loss`. Reading them later costs one product with the LM head.
    """

    @classmethod
    def of(cls, compute_logits: Callable[[], Tensor], **fields: Any) -> DeferredLogitsOutput:
        """An output with the given fields, and logits from `compute_logits`."""
        loss = fields.pop("loss")
        return cls(loss=loss, logits=_Deferred(compute_logits), **fields)  # type: ignore[arg-type]

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "logits" and isinstance(value, _Deferred):
            value = value.compute()
            self.logits = value  # ModelOutput writes the key as well as the attribute
        return value

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            return self.to_tuple()[key]
        return getattr(self, key if isinstance(key, str) else list(self.keys())[key])

    def items(self) -> ItemsView:  # type: ignore[override]
        """As of a dict, logits included."""
        return {key: self[key] for key in self}.items()

    def values(self) -> ValuesView:  # type: ignore[override]
        """As of a dict, logits included."""
        return {key: self[key] for key in self}.values()

    def get(self, key: Any, default: Any = None) -> Any:
        """As of a dict."""
        return self[key] if key in self else default  # noqa: SIM401 (this is that method)


def one_of(num_logits_to_keep: int | Tensor, logits_to_keep: int | Tensor) -> int | Tensor:
    """The value of an argument with two names.

    Raises:
        ValueError: both, with different values; or a negative number.
    """
    used = [keep for keep in (num_logits_to_keep, logits_to_keep) if isinstance(keep, Tensor) or keep != 0]
    if len(used) == 2 and not (isinstance(used[0], int) and used[0] == used[1]):
        raise ValueError(
            f"num_logits_to_keep is {num_logits_to_keep} and logits_to_keep is {logits_to_keep}; "
            f"they are two names of one argument"
        )
    keep = used[0] if used else 0
    if isinstance(keep, int) and keep < 0:
        raise ValueError(f"num_logits_to_keep is {keep}; it must be 0 (all) or more")
    return keep


def kept_positions(states: Tensor, keep: int | Tensor) -> Tensor:
    """The kept positions of states (B, T, D).

    Args:
        keep: n, the last n positions, 0 for all: (B, n, D); (n,) indices: (B, n, D); (B, n) indices of each row:
            (B, n, D); (B, T) bools: (number of true values, D).
    """
    if isinstance(keep, int):
        return states[:, slice(-keep, None)]
    if keep.dim() < 2:
        return states[:, keep]
    return states[keep] if keep.dtype == torch.bool else torch.take_along_dim(states, keep[..., None], dim=1)
