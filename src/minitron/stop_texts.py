"""Stop strings without a table of the vocabulary.

transformers' `StopStringCriteria` compares every token of the vocabulary with every stop string before the first token:
34 ms with 4,096 tokens and three strings, half a second with 49,152 (one Zen 4 core), and again in each call. Here the
end of the new text is decoded instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria


class StopTexts(StoppingCriteria):
    """Ends a text when its new tokens contain one of some strings; the prompt is not searched.

    Special tokens count as the strings that they are written as.

    Args:
        tokenizer: of the ids.
        texts: the strings, none of them empty.
        begin: length of the prompts, with their padding.
        every: look after each so many tokens. A text that is cut at the string later may go on a little.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], begin: int, every: int = 1) -> None:
        self._tokenizer, self._texts, self._begin, self._every = tokenizer, tuple(texts), begin, every
        # A token is a byte or more. One more is decoded because decoders treat the first token in their own ways.
        self._window = max((len(text.encode()) for text in texts), default=0) + every + 1

    def __call__(self, input_ids: torch.Tensor, scores: Any = None, **_: Any) -> torch.Tensor:  # type: ignore[override]
        """Which rows of ids (B, T) have come to a stop string, (B,) bool."""
        rows, new = input_ids.shape[0], input_ids.shape[1] - self._begin
        if not self._texts or new % self._every:
            return torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        first = max(self._begin, input_ids.shape[1] - self._window)
        ends = self._tokenizer.batch_decode(input_ids[:, first:].tolist(), clean_up_tokenization_spaces=False)
        found = [any(text in end for text in self._texts) for end in ends]
        return torch.tensor(found, device=input_ids.device)
