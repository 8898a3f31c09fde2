"""The seam between `generate` and the decode engine: which of them serves a request, and what is said about it.

The engine is above the model and packs it, so it is named here and imported when text is generated.
"""

from __future__ import annotations

import importlib
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

ENGINE_MODULE = "minitron.engine.generation"

ENGINE_CHOICE: ContextVar[str] = ContextVar("minitron_engine", default="auto")
"""The `engine` argument of the `generate` call in progress."""


@dataclass
class GenerationReport:
    """What ran in the last `generate` of a model, which keeps it as `last_generation`."""

    engine: str
    """"cpu" (compiled), "reference" (torch, where Numba is missing) or "transformers"."""
    reason: str = ""
    """Why transformers' own path ran."""
    active_neurons: int = 0
    """MLP neurons that were not zero, over decoded tokens and layers."""
    seen_neurons: int = 0
    """MLP neurons over decoded tokens and layers."""

    @property
    def zero_fraction(self) -> float | None:
        """Share of MLP neurons that were exactly zero, whose rows of `down_proj` need not be read."""
        return 1 - self.active_neurons / self.seen_neurons if self.seen_neurons else None


class EngineDecoding:
    """`generate` that leaves the loop over tokens to the engine where it can; goes before `GenerationMixin`."""

    last_generation: GenerationReport | None = None
    """What ran in the last call of `generate`, and why; None before the first, and after beam search and the like."""

    def generate(self, inputs: Tensor | None = None, *args: Any, engine: str = "auto", **kwargs: Any) -> Any:
        """As transformers' `generate`.

        Args:
            engine: "auto" decodes with `minitron.engine` what it can serve; "off" leaves all to transformers.
                `last_generation` tells which one ran, and why.
        """
        if engine not in ("auto", "off"):
            raise ValueError(f"engine is {engine!r}; it must be 'auto' or 'off'")
        self.last_generation = None
        before = ENGINE_CHOICE.set(engine)
        try:
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        finally:
            ENGINE_CHOICE.reset(before)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        # transformers' `generate` calls this for greedy decoding and sampling, when all is prepared.
        engine = importlib.import_module(ENGINE_MODULE)
        request = (input_ids, logits_processor, stopping_criteria, generation_config)
        found = engine.sample(self, *request, streamer, kwargs)
        return super()._sample(*request, streamer=streamer, **kwargs) if found is None else found  # type: ignore[misc]
