"""The output of the causal language model when only its loss may be wanted."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, ValuesView
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast


class _Deferred:
    """Logits that are computed when somebody reads them."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute = compute


class DeferredLogitsOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` whose `logits` are computed on first reading, by whatever way they are read.

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
