"""The rules of a request, as transformers has prepared them, in the form that the loops over tokens use."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

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
from .draws import CLOSE, Draws
from .mt19937 import seeded
from .sampling import Array, choose, distribution
from .torch_generator import draws_alike, held

if TYPE_CHECKING:
    from .base import DecodeEngine

SOFTMAX_CLOSE = 1 - 2.0**-15
"""As `Draws` has it, for probabilities of torch's softmax in fp32."""


class Rules:
    """Which token comes next, and whether a text ends with it. Sequences are rows of ids (B, T), padded on the left."""

    def __init__(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        batch: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        """The rules of a request.

        Args:
            processors: of the logits.
            criteria: that end a text.
            config: of the request.
            batch: number of texts.
            device: where the processors and criteria of the caller work: that of the prompts.
        """
        self._device = torch.device(device)
        self.sampling = bool(config.do_sample)
        """Whether tokens are drawn; otherwise the most probable one is taken."""
        self.limit: int = config.max_length  # type: ignore[assignment]
        """Largest length of a text, the prompt included."""
        pad = getattr(config, "_pad_token_tensor", None)
        self.pad = 0 if pad is None else int(pad.flatten()[0])
        """Follows the end of a text while others go on."""
        self._processors = processors
        self._two: dict[int, tuple[Any, bool]] = {}
        self._draws: Draws | None = None
        self._parameters = parameters_of(processors, self.sampling)
        known, self._last_parameters = _known_end(processors, self.sampling)
        self._before = LogitsProcessorList(processors[:-known]) if known else processors
        self._last = LogitsProcessorList(processors[-known:] if known else [])
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

    @property
    def known(self) -> bool:
        """Whether an engine can choose the tokens by itself, greedily or by `draws`."""
        return self._parameters is not None and (not self.sampling or draws_alike())

    def draws(self, ids: Tensor, engine: DecodeEngine, steps: int = 4) -> Draws | None:
        """How an engine chooses tokens after these texts (B, T); None if it takes other rules than `Draws` knows.

        Its random numbers are yet to be set, see `loop.numbers_of`; those of `steps` steps are kept.
        """
        if self._parameters is None or not self.known:
            return None
        return engine.draws_of(self._parameters, self.seen(ids), steps)

    def scores(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Logits (B, V), which may change, after the caller's processors, on the device of these."""
        return self._processed(self._processors, ids, logits)

    def _processed(self, processors: LogitsProcessorList, ids: Tensor, logits: Tensor) -> Tensor:
        ids, logits = ids.to(self._device), logits.to(self._device)
        if type(processors) is not LogitsProcessorList:
            return processors(ids, logits)  # type: ignore[arg-type]
        for processor in processors:
            if not self._takes_two(processor):
                return processors(ids, logits)  # type: ignore[arg-type] (its error says what is missing)
        for processor in processors:
            logits = processor(ids, logits)  # type: ignore[arg-type,assignment]
        return logits

    def _takes_two(self, processor: Any) -> bool:
        """Whether a processor takes ids and scores only: transformers looks at its signature for each token."""
        known = self._two.get(id(processor))
        if known is None or known[0] is not processor:
            known = self._two[id(processor)] = processor, len(signature(processor.__call__).parameters) <= 2
        return known[1]

    def next_tokens(self, ids: Tensor, logits: Tensor, engine: DecodeEngine | None = None) -> Array:
        """The next token of each row, (B,), for logits (B, V), which may change.

        Raises:
            NotFiniteError: the largest logit of a row is NaN or infinite.
        """
        if self._parameters is not None:
            return choose(logits.cpu().numpy(), self._parameters, self.seen(ids))
        check_logits(logits if logits.is_cuda else logits.numpy())
        if not self.sampling:
            return self.scores(ids, logits).cpu().numpy().argmax(-1)
        return self._chosen(ids, self._processed(self._before, ids, logits), engine)

    def _chosen(self, ids: Tensor, scores: Tensor, engine: DecodeEngine | None) -> Array:
        """A token (B,) drawn from each row of scores (B, V), to which the processors that `Draws` knows still apply.

        The draws are torch's, by compiled code where there is some.
        """
        if engine is not None and not scores.is_cuda and scores.dtype == torch.float32 and draws_alike():
            if self._draws is None:
                no_ids = [np.zeros(0, np.int64)] * len(scores)
                close = CLOSE if self._last else SOFTMAX_CLOSE
                self._draws = Draws(self._last_parameters, scores.shape[1], no_ids, seeded(0), close)
            with held() as twister:
                self._draws.state = twister
                tokens = engine.pick(self._draws, scores.numpy())
                if (tokens >= 0).all():
                    twister.block, twister.used = self._draws.state.block, self._draws.state.used
                    return tokens
        scores = self._processed(self._last, ids, scores)
        return torch.multinomial(scores.softmax(-1), 1)[:, 0].cpu().numpy()

    def distribution(self, ids: Tensor, logits: Tensor) -> Array:
        """The probability of every token, (V,) float64, after one text ids (1, T) with logits (V,)."""
        if self._parameters is not None:
            return distribution(logits.cpu().numpy(), self._parameters, self.seen(ids)[0])
        check_logits(logits if logits.is_cuda else logits.numpy())
        return self.scores(ids, logits[None].clone())[0].double().softmax(-1).cpu().numpy()

    def seen(self, ids: Tensor) -> list[Array]:
        """The tokens that the repetition penalty counts: each row without padding and what the caller excludes."""
        return [row[first:] for row, first in zip(ids.numpy(), self._unseen, strict=True)]

    def ended(self, ids: Tensor, scores: Any = None) -> Array:
        """Which rows end with their last token, (B,) bool."""
        full = ids.shape[1] >= self.limit
        done = np.array([full or token in self.ends for token in ids[:, -1].tolist()])
        for rule in self._other:
            found = rule(ids.to(self._device), scores)  # type: ignore[arg-type]
            done |= found.cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
        return done


def _known_end(processors: LogitsProcessorList, do_sample: bool) -> tuple[int, SamplingParameters]:
    """The number of last processors that change scores as `Draws` does, whatever the text, and their parameters."""
    found = 0, SamplingParameters(temperature=1.0)
    if type(processors) is not LogitsProcessorList or not do_sample:
        return found
    for count in range(1, len(processors)):
        parameters = parameters_of(LogitsProcessorList(processors[-count:]), do_sample)
        if parameters is None or parameters.repetition_penalty != 1:
            break
        found = count, parameters
    return found


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
