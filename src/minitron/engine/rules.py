"""A request's rules, as transformers has prepared them, in the form that the loops over tokens use."""

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
from .sampling import Array, Choice, choose, law


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
        """Tokens of a text at most, prompt included."""
        pad = getattr(config, "_pad_token_tensor", None)
        self.pad = 0 if pad is None else int(pad.flatten()[0])
        """What follows the end of a text while others go on."""
        self._processors = processors
        self._choice = choice_of(processors, self.sampling)
        self._unseen = [0] * batch
        for processor in processors:
            if isinstance(processor, RepetitionPenaltyLogitsProcessor) and processor.prompt_ignore_length is not None:
                self._unseen = torch.as_tensor(processor.prompt_ignore_length).expand(batch).tolist()
        self.ends = {int(end) for rule in criteria if hasattr(rule, "eos_token_id") for end in rule.eos_token_id}  # type: ignore[attr-defined]
        """Tokens that end a text."""
        self.plain = self._choice == Choice()
        """Whether the most probable token is taken, whatever came before."""
        self._other = [
            rule for rule in criteria if not hasattr(rule, "eos_token_id") and not hasattr(rule, "max_length")
        ]

    def scores(self, ids: Tensor, logits: Tensor) -> Tensor:
        """What the caller's processors make of logits (B, V)."""
        return self._processors(ids, logits.clone())  # type: ignore[arg-type]

    def next_tokens(self, ids: Tensor, logits: Tensor) -> Array:
        """The next token of each row, (B,), for logits (B, V)."""
        if self._choice is not None:
            return choose(logits.numpy(), self._choice, self._seen(ids))
        scores = self.scores(ids, logits)
        check_logits(logits)
        chosen = torch.multinomial(scores.softmax(-1), 1)[:, 0] if self.sampling else scores.argmax(-1)
        return chosen.numpy()

    def law(self, ids: Tensor, logits: Tensor) -> Array:
        """The probability of every token, (V,) float64, after one text ids (1, T) with logits (V,)."""
        if self._choice is not None:
            return law(logits.numpy(), self._choice, self._seen(ids)[0])
        check_logits(logits)
        return self.scores(ids, logits[None])[0].double().softmax(-1).numpy()

    def _seen(self, ids: Tensor) -> list[Array]:
        """What the repetition penalty looks at: each row without its padding, or what else the caller leaves out."""
        return [row[first:] for row, first in zip(ids.numpy(), self._unseen, strict=True)]

    def ended(self, ids: Tensor, scores: Any = None) -> Array:
        """Which rows end with their last token, (B,) bool."""
        full = ids.shape[1] >= self.limit
        done = np.array([full or token in self.ends for token in ids[:, -1].tolist()])
        for rule in self._other:
            done = done | torch.as_tensor(rule(ids, scores)).numpy()  # type: ignore[arg-type]
        return done


def choice_of(processors: LogitsProcessorList, do_sample: bool) -> Choice | None:
    """These processors as one rule; None if there are others, or in another order."""
    fields: dict[str, Any] = {"temperature": 1.0 if do_sample else 0.0}
    order = (
        (RepetitionPenaltyLogitsProcessor, "repetition_penalty", "penalty"),
        (TemperatureLogitsWarper, "temperature", "temperature"),
        (TopKLogitsWarper, "top_k", "top_k"),
        (TopPLogitsWarper, "top_p", "top_p"),
        (MinPLogitsWarper, "min_p", "min_p"),
    )
    place = 0
    for processor in processors:
        names = [(at, field, name) for at, (kind, field, name) in enumerate(order) if type(processor) is kind]
        if not names or names[0][0] < place:
            return None
        place, field, name = names[0]
        fields[field] = getattr(processor, name)
    return Choice(**fields)
