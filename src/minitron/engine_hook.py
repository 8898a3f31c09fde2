"""The hook by which `generate` calls the decode engine, and the report on what ran.

The engine is in a layer above the model, so it is named here and imported when text is generated.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from .engine_choices import ENGINES
from .finite import NotFiniteError, check_attention, check_logits, explain
from .framework import CACHE_NAMES, TESTED, installed, method_of_generation, with_framework_name
from .masks import padding_mask, restarts

ENGINE_MODULE = "minitron.engine.generation"
CHECK_MODULE = "minitron.release_check"

ENGINE_CHOICE: ContextVar[str] = ContextVar("minitron_engine", default="auto")
"""The `engine` argument of the `generate` call in progress."""


@contextmanager
def engine_choice(engine: str) -> Iterator[None]:
    """Choose among `ENGINES` within the block."""
    before = ENGINE_CHOICE.set(engine)
    try:
        yield
    finally:
        ENGINE_CHOICE.reset(before)


DRAFT_CHOICE: ContextVar[Any] = ContextVar("minitron_draft", default=None)
"""The `draft` argument of the `generate` call in progress."""


REPORT: ContextVar[GenerationReport | None] = ContextVar("minitron_report", default=None)
"""The report of the `generate` call in progress; each call, and so each thread, has its own."""


@dataclass
class Speculation:
    """What speculation achieved; see `engine.speculate`."""

    steps: int = 0
    """Steps of the model; one of several texts counts for each of them."""
    tokens: int = 0
    """Tokens of the text that these steps produced."""
    drafted: int = 0
    """Tokens that were drafted; not those by which the time of a check was measured."""
    kept: int = 0
    """Drafted tokens that were accepted."""
    reason: str = ""
    """Why a request with a draft was decoded without; empty if drafts were possible, whether or not they paid."""

    @property
    def acceptance_rate(self) -> float:
        """Share of drafted tokens that were accepted."""
        return self.kept / self.drafted if self.drafted else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Tokens of a text for each step of the model; 1 without speculation."""
        return self.tokens / self.steps if self.steps else 0.0


@dataclass
class GenerationReport:
    """What ran in a call of `generate`: hand one in as `report`, or read the model's `last_generation`."""

    engine: str = "transformers"
    """"cpu" (compiled), "cuda" (CUDA graphs), "reference" (plain torch) or "transformers"."""
    reason: str = ""
    """Why transformers' own path ran; empty if the engine ran, and after beam search and the like."""
    active_neurons: int = 0
    """MLP neurons that were not zero, over decoded tokens and layers."""
    seen_neurons: int = 0
    """MLP neurons over decoded tokens and layers."""
    speculation: Speculation | None = None
    """What speculation achieved, or why there was none; None where no draft was asked for."""

    def become(self, other: GenerationReport) -> None:
        """Take over all that another report says."""
        vars(self).update(vars(other))

    @property
    def zero_fraction(self) -> float | None:
        """Share of MLP neurons that were exactly zero, whose rows of `down_proj` need not be read."""
        return 1 - self.active_neurons / self.seen_neurons if self.seen_neurons else None


def report_on(model: EngineDecoding | PreTrainedModel, found: GenerationReport) -> None:
    """Put what ran into the report of the `generate` call in progress, which becomes the model's last one."""
    report = REPORT.get() or GenerationReport()
    report.become(found)
    model.last_generation = report  # type: ignore[assignment] (transformers' own classes take it as a plain attribute)


class FiniteLogits(LogitsProcessor):
    """Returns scores (B, V) unchanged.

    Raises:
        NotFiniteError: the largest score of a row is NaN or infinite.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        """See the class."""
        try:
            check_logits(scores)
        except NotFiniteError as error:
            raise explain(error, self._model) from None
        return scores


class EngineDecoding:
    """`generate` that leaves the loop over tokens to the engine where it can; goes before `GenerationMixin`."""

    last_generation: GenerationReport | None = None
    """The report of the call of `generate` that ended last; None before the first, and after beam search and the like.

    Where several threads generate, hand a `report` to each call instead.
    """

    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        engine: str = "auto",
        draft: Any = None,
        report: GenerationReport | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers' `generate`.

        Args:
            engine: "auto" decodes with `minitron.engine` what it can serve, on the CPU or a GPU; "off" leaves all to
                transformers; "cuda" decodes with the code of the GPU's engine wherever the model is, so that it can be
                tried on a CPU, where it is slower than "auto".
            draft: speculation that does not change the text (greedy) or its distribution (sampling): "lookup" drafts
                what followed the same words earlier in the text; "self" drafts with the model's own weights in int4;
                "default" drafts with the smaller bundled model if this is the bundled model, and as "self" otherwise;
                another `NemotronForCausalLM` with the same tokenizer, or its `EngineWeights`, drafts by decoding. The
                texts of a batch are drafted together; where a draft cannot serve a batch, it is decoded without, and
                the report says why. A draft has no effect where the engine does not run. transformers'
                `prompt_lookup_num_tokens` and `assistant_model` are served the same way.
            report: filled with what ran, and why. The model keeps the last report as `last_generation`.
        """
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}; it must be one of {', '.join(ENGINES)}")
        if installed() not in TESTED:
            importlib.import_module(CHECK_MODULE).require(self)
        self.last_generation = None
        report = GenerationReport() if report is None else report
        report.become(GenerationReport())  # one that was used before
        before = ENGINE_CHOICE.set(engine), DRAFT_CHOICE.set(draft), REPORT.set(report)
        try:
            return super().generate(inputs, *args, **_checked_masks(kwargs))  # type: ignore[misc]
        finally:
            ENGINE_CHOICE.reset(before[0])
            DRAFT_CHOICE.reset(before[1])
            REPORT.reset(before[2])

    @wraps(method_of_generation("prepare_inputs_for_generation"))  # transformers reads this signature
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As of transformers; the cache may have either of its names."""
        return super().prepare_inputs_for_generation(*args, **with_framework_name(kwargs))  # type: ignore[misc]

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        **kwargs: Any,
    ) -> Any:
        # transformers' `generate` calls this for greedy decoding and sampling, after it has prepared the request.
        engine = importlib.import_module(ENGINE_MODULE)
        request = (input_ids, logits_processor, stopping_criteria, generation_config)
        found = engine.sample(self, *request, streamer, with_framework_name(kwargs, CACHE_NAMES[0]))
        if found is not None:
            return found
        check_attention(self)  # type: ignore[arg-type]
        checked = LogitsProcessorList([FiniteLogits(self), *logits_processor])  # type: ignore[arg-type]
        return super()._sample(input_ids, checked, *request[2:], streamer=streamer, **kwargs)  # type: ignore[misc]

    def _assisted_decoding(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        streamer: Any = None,
        inputs_tensor: Any = None,
        assistant_model: Any = None,
        assistant_tokenizer: Any = None,
        **kwargs: Any,
    ) -> Any:
        # transformers' `generate` calls this where there is an assistant; it inspects the names of these parameters.
        request = (input_ids, logits_processor, stopping_criteria, generation_config)
        if assistant_tokenizer is None:
            engine = importlib.import_module(ENGINE_MODULE)
            named = with_framework_name(kwargs, CACHE_NAMES[0])
            found = engine.assisted(self, *request, streamer, assistant_model, named)
            if found is not None:
                return found
        return super()._assisted_decoding(  # type: ignore[misc]
            *request,
            streamer=streamer,
            inputs_tensor=inputs_tensor,
            assistant_model=assistant_model,
            assistant_tokenizer=assistant_tokenizer,
            **kwargs,
        )


def _checked_masks(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `generate` with a mask of padding as int64, the form that tokenizers give and all paths read.

    Raises:
        ValueError: a mask that is not one of padding, or positions that restart within a row.
    """
    mask = padding_mask(kwargs.get("attention_mask"))
    if isinstance(mask, Tensor) and mask.dim() == 2:
        kwargs = {**kwargs, "attention_mask": mask.long()}
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] > 1:
        padding = isinstance(mask, Tensor) and mask.dim() == 2
        real = mask[:, -positions.shape[1] :] if padding else torch.ones_like(positions)  # type: ignore[index]
        if (mask is None or padding) and real.shape[1] == positions.shape[1] and restarts(positions, real):
            raise ValueError(
                "position_ids restart within a row; generate continues one text in each row. Give each document a row "
                "of its own, padded on the left"
            )
    return kwargs
