"""Texts that a model writes after prompts, several at a time where what one text gets does not depend on the others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList

from ..engine.models import why_not_model
from ..family_models import engine_decodes
from ..sampling_parameters import NEUTRAL
from ..shapes import describe
from ..stop_texts import StopTexts

MOST_TEXTS = 16
"""Texts that are written at once."""
CACHE_BYTES = 1 << 30
"""Keys and values of all texts that are written at once."""
TOKENS_BETWEEN_LOOKS = 4
"""A text is searched for stop strings after so many tokens: what is written behind one is cut off anyway."""


@dataclass(frozen=True)
class Wanted:
    """A text to write."""

    prompt: list[int]
    """Token ids, at least one."""
    room: int
    """Largest number of new tokens."""
    until: tuple[str, ...]
    """Strings that end the text."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of `generate`; greedy without `do_sample`."""
    seed: int = 0
    """Of the draws, if there are any."""

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return bool(self.settings.get("do_sample"))


def write(
    model: Any, tokenizer: PreTrainedTokenizerBase, end: int, wanted: Sequence[Wanted]
) -> Iterator[list[tuple[int, str]]]:
    """Write texts, in any order.

    Greedy texts are written several at a time if the model's engine decodes them: each is then what it is alone.

    Args:
        end: the token that ends a text; it fills rows of shorter texts.

    Yields:
        (index, text) of those that were written together. A text may go on behind a stop string.
    """
    together: dict[str, list[int]] = {}
    for index, one in enumerate(wanted):
        if one.samples:
            yield [(index, _texts(model, tokenizer, end, [one])[0])]
        else:
            together.setdefault(json.dumps([one.room, one.until, one.settings], default=str), []).append(index)
    for group in together.values():
        group.sort(key=lambda index: len(wanted[index].prompt), reverse=True)  # the longest needs the most memory
        while group:
            count = _texts_at_once(model, len(wanted[group[0]].prompt) + wanted[group[0]].room)
            part, group = group[:count], group[count:]
            yield list(zip(part, _texts(model, tokenizer, end, [wanted[index] for index in part]), strict=True))


def _texts_at_once(model: Any, length: int) -> int:
    if not engine_decodes(model) or why_not_model(model):
        return 1  # torch's products round in ways that depend on the batch
    size = length * describe(model.config).kv_bytes_per_token(4)
    return max(1, min(MOST_TEXTS, int(CACHE_BYTES // size)))


def _texts(model: Any, tokenizer: PreTrainedTokenizerBase, end: int, wanted: list[Wanted]) -> list[str]:
    """The new text of each, all with the settings of the first."""
    first, length = wanted[0], max(len(one.prompt) for one in wanted)
    settings = dict(first.settings)
    if first.samples:
        torch.manual_seed(first.seed)
    else:
        settings |= {"do_sample": False}
        settings.pop("temperature", None)
    ids = torch.full((len(wanted), length), end)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(wanted):
        ids[row, length - len(one.prompt) :] = torch.tensor(one.prompt)
        mask[row, length - len(one.prompt) :] = 1
    out = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=first.room,
        pad_token_id=end,  # behind a text that has ended; not shown, or cut off as the end is
        stopping_criteria=StoppingCriteriaList([StopTexts(tokenizer, first.until, length, TOKENS_BETWEEN_LOOKS)]),
        stop_strings=None,  # not the checkpoint's
        **{**NEUTRAL, **settings},  # the task's settings only, not those that the checkpoint recommends
    )
    return tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
