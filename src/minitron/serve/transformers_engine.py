"""The engine's interface over a model that the CPU engine cannot run: transformers' forward pass, slot by slot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..engine.base import DecodeEngine


class _Slots:
    """Which slots are taken, and how many tokens each has: the part of `KeyValues` that needs no engine weights."""

    def __init__(self, capacity: int, slots: int) -> None:
        self.capacity, self.lengths, self.taken = capacity, [0] * slots, set[int]()

    def free_slot(self) -> int:
        """The first slot without a request.

        Raises:
            ValueError: there is none.
        """
        for slot in range(len(self.lengths)):
            if slot not in self.taken:
                return slot
        raise ValueError(f"all {len(self.lengths)} slots are taken")


class TransformersEngine(DecodeEngine):
    """A `DecodeEngine` whose slots are caches of transformers. Each sequence is a batch of its own, so that it does not
    depend on the others."""

    name = "transformers"

    def __init__(self, model: Any, capacity: int, slots: int = 1) -> None:
        """Serve a causal language model with `slots` sequences of at most `capacity` tokens."""
        self._model = model.eval()
        self.weights: Any = None  # they are the model's
        self.kv: Any = _Slots(capacity, slots)
        self._caches: list[DynamicCache | None] = [None] * slots

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    @property
    def active_neurons(self) -> int:
        """Not counted."""
        return 0

    @property
    def seen_neurons(self) -> int:
        """Not counted."""
        return 0

    def release(self, slot: int) -> None:
        """Forget a slot's sequence and make the slot free."""
        self._caches[slot] = None
        self.kv.lengths[slot] = 0
        self.kv.taken.discard(slot)

    def truncate(self, length: int, slot: int = 0) -> None:
        """Forget all but the first `length` tokens of a slot's sequence."""
        cache = self._caches[slot]
        if cache is not None and length < self.kv.lengths[slot]:
            cache.crop(length - self.kv.lengths[slot])  # how many to remove, as a negative number
            self.kv.lengths[slot] = length

    def reserve(self, capacity: int) -> None:
        """Let each slot hold at least `capacity` tokens: caches grow by themselves."""
        self.kv.capacity = max(self.kv.capacity, capacity)

    def prepare(self, prompt: int | None = None) -> None:
        """Nothing to compile."""

    def prefill(self, tokens: list[int], slot: int = 0, more: bool = False) -> None:
        """Append tokens to a slot's sequence; their logits are not used."""
        self._forward(tokens, slot, 1)

    def step(self, tokens: list[int], slot: int = 0) -> Tensor:
        """Append tokens to a slot's sequence; logits (len(tokens), V) fp32 after each."""
        return self._forward(tokens, slot, len(tokens))

    def close(self) -> None:
        """No threads to end."""

    @torch.inference_mode()
    def _forward(self, tokens: list[int], slot: int, kept: int) -> Tensor:
        cache = self._caches[slot]
        if cache is None:
            cache = self._caches[slot] = DynamicCache(config=self._model.config)

        def keep_hidden(module: Any, args: Any, out: Any) -> None:
            self.hidden = out.last_hidden_state[0, -kept:].float().cpu().numpy()

        ids = torch.tensor([tokens], device=self.device)
        hook = self._model.base_model.register_forward_hook(keep_hidden)
        try:
            out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=kept)
        finally:
            hook.remove()
        self.kv.lengths[slot] += len(tokens)
        return out.logits[0].float().cpu()
