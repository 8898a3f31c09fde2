"""The rules of a request, as transformers has prepared them, in the form that the loops over tokens use."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..finite import check_logits
from ..sampling_parameters import SamplingParameters
from .sampling import Array, choose, distribution


class Rules:
    """Which token comes next, and whether a text ends with it. Sequences are rows of ids (B, T), padded on the left."""

    def __init__(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        batch: int = 1,
    ) -> None:
        self.sampling = bool(config.do_sample)
        """Whether tokens are drawn; otherwise the most probable one is taken."""
        self.limit: int = config.max_length  # type: ignore[assignment]
        """Largest length of a text, the prompt included."""
        pad = getattr(config, "_pad_token_tensor", None)
        self.pad = 0 if pad is None else int(pad.flatten()[0])
        """Follows the end of a text while others go on."""
        self._processors = processors
        self._parameters = parameters_of(processors, self.sampling)
        self._unseen = [0] * batch
        for processor in processors:
            if isinstance(processor, RepetitionPenaltyLogitsProcessor) and processor.prompt_ignore_length is not None:
                self._unseen = torch.as_tensor(processor.prompt_ignore_length).expand(batch).tolist()
        self.ends = {int(end) for rule in criteria if hasattr(rule, "eos_token_id") for end in rule.eos_token_id}  # type: ignore[attr-defined]
        """Tokens that end a text."""
        self.plain = self._parameters is not None and self._parameters.greedy
        """Whether the next token is the most probable one, whatever came before."""
        self._other = [
            rule for rule in criteria if not hasattr(rule, "eos_token_id") and not hasattr(rule, "max_length")
        ]

    def scores(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Logits (B, V) after the caller's processors."""
        return self._processors(ids, logits.clone())  # type: ignore[arg-type]

    def next_tokens(self, ids: Tensor, logits: Tensor) -> Array:
        """The next token of each row, (B,), for logits (B, V)."""
        if self._parameters is not None:
            return choose(logits.numpy(), self._parameters, self._seen(ids))
        scores = self.scores(ids, logits)
        check_logits(logits)
        chosen = torch.multinomial(scores.softmax(-1), 1)[:, 0] if self.sampling else scores.argmax(-1)
        return chosen.numpy()

    def distribution(self, ids: Tensor, logits: Tensor) -> Array:
        """The probability of every token, (V,) float64, after one text ids (1, T) with logits (V,)."""
        if self._parameters is not None:
            return distribution(logits.numpy(), self._parameters, self._seen(ids)[0])
        check_logits(logits)
        return self.scores(ids, logits[None])[0].double().softmax(-1).numpy()

    def _seen(self, ids: Tensor) -> list[Array]:
        """The tokens that the repetition penalty counts: each row without padding and what the caller excludes."""
        return [row[first:] for row, first in zip(ids.numpy(), self._unseen, strict=True)]

    def ended(self, ids: Tensor, scores: Any = None) -> Array:
        """Which rows end with their last token, (B,) bool."""
        full = ids.shape[1] >= self.limit
        done = np.array([full or token in self.ends for token in ids[:, -1].tolist()])
        for rule in self._other:
            done = done | torch.as_tensor(rule(ids, scores)).numpy()  # type: ignore[arg-type]
        return done


def parameters_of(processors: LogitsProcessorList, do_sample: bool) -> SamplingParameters | None:
    """These processors as parameters; None if there are other processors, another order, or values out of range."""
    fields: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0}
    order = (
        (RepetitionPenaltyLogitsProcessor, "repetition_penalty", "penalty"),
        (TemperatureLogitsWarper, "temperature", "temperature"),
        (TopKLogitsWarper, "top_k", "top_k"),
        (TopPLogitsWarper, "top_p", "top_p"),
        (MinPLogitsWarper, "min_p", "min_p"),
    )
    last = 0
    for processor in processors:
        names = [(at, field, name) for at, (kind, field, name) in enumerate(order) if type(processor) is kind]
        if not names or names[0][0] < last:
            return None
        last, field, name = names[0]
        fields[field] = getattr(processor, name)
    try:
        return SamplingParameters(**fields)
    except ValueError:  # transformers allows more, such as a penalty of 5000
        return None
