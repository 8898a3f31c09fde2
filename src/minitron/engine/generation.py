"""Where `generate` meets the engine: it gets the model's weights, chooses the loop and reports what ran.

transformers prepares a request (settings, logits processors, stopping criteria, streamer) and calls `_sample`, or
`_assisted_decoding` if there is an assistant. If the engine can serve the model and the request, the loops of this
package (`loop`, `speculate`) run instead of transformers' own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..engine_hook import DRAFT_CHOICE, GenerationReport, Speculation, report_on
from ..family_models import engine_decodes
from ..finite import NotFiniteError, explain
from ..framework import CACHE_NAME
from ..model import check_ids
from .base import DecodeEngine
from .draft_choice import check_draft, draft_weights, speculate, why_not_drafted
from .draft_length import MOST_DRAFTED
from .engines import engine_for_call
from .kv import KeyValues
from .loop import Record, decode
from .model_weights import weights_of
from .models import why_not_model
from .requests import starts_of, why_not_request
from .rules import Rules

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

    from .parts import EngineWeights


def prepare(model: object, draft: object = None) -> None:
    """Copy a model's weights and compile what decoding with it needs, so that its first token need not wait for that.

    A compilation that takes long is logged. Where the engine does not run, nothing is done. A draft of the model's own
    weights is not copied here: whether that is worth its time depends on the text.

    Args:
        model: any model.
        draft: see `NemotronForCausalLM.generate`.

    Raises:
        ValueError: the draft does not fit the model.
    """
    if not engine_decodes(model) or why_not_model(model):
        return
    parts: list[EngineWeights | None] = [weights_of(model)]
    if draft not in (None, "lookup"):
        parts.append(draft_weights(model, draft))
    for weights in parts:
        if weights is not None:
            with engine_for_call(weights, 1) as engine:
                engine.prepare()


# --- a request ---------------------------------------------------------------------------------------------------


def sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    kwargs: dict[str, Any],
) -> Tensor | GenerateDecoderOnlyOutput | None:
    """As transformers' `_sample`: prompts, padded on the left, and what follows them, (B, T). None if not served.

    Fills the call's report, and sets `model.last_generation`, either way.

    Raises:
        ValueError: ids outside the vocabulary, or a draft that does not fit the model.
        NotFiniteError: the model computes NaN; the message names the weights.
    """
    reason = why_not_request(input_ids, config, kwargs) or why_not_model(model)
    if reason:
        report_on(model, GenerationReport("transformers", reason))
        return None
    check_ids(input_ids, model.model.embed_tokens.num_embeddings, "input_ids")
    return _generated(model, input_ids, processors, criteria, config, streamer, kwargs, DRAFT_CHOICE.get())


def _generated(
    model: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    kwargs: dict[str, Any],
    draft: object,
    most: int = MOST_DRAFTED,
) -> Tensor | GenerateDecoderOnlyOutput:
    """What `sample` returns, for a request that is served, with at most so many tokens of a draft at a time."""
    rules = Rules(processors, criteria, config, len(input_ids), input_ids.device)
    starts, device = starts_of(input_ids, kwargs), input_ids.device
    input_ids = input_ids.cpu()  # the loops work with them on the host
    record = Record() if config.return_dict_in_generate else None
    cache = kwargs.get("past_key_values")
    hand_over = record is not None or getattr(cache, "_is_user_defined", False)
    if draft is not None:
        check_draft(draft)
    try:
        with engine_for_call(weights_of(model), rules.limit, len(starts)) as engine:
            found = None if draft is None else Speculation()
            if found is not None:
                found.reason = "scores or a cache are returned" if hand_over else why_not_drafted(rules, starts, engine)
            if found is not None and not found.reason:
                ids, found = speculate(model, engine, input_ids, starts, rules, draft, most, streamer)
            else:
                ids = decode(engine, input_ids, starts, rules, streamer, record, whole=hand_over)
            ids = ids.to(device)
            _report(model, engine, found)
            if hand_over:
                cache = DynamicCache(config=model.config) if cache is None else cache
                _hand_over(engine.kv, starts, cache)
    except NotFiniteError as error:
        raise explain(error, model) from None
    if streamer is not None:
        streamer.end()
    if record is None:
        return ids
    return GenerateDecoderOnlyOutput(
        sequences=ids,  # type: ignore[arg-type]
        scores=tuple(record.scores) if config.output_scores else None,  # type: ignore[arg-type]
        logits=tuple(record.logits) if config.output_logits else None,  # type: ignore[arg-type]
        **{CACHE_NAME: cache},  # type: ignore[arg-type]
    )


def assisted(
    model: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    assistant: object,
    kwargs: dict[str, Any],
) -> Tensor | GenerateDecoderOnlyOutput | None:
    """As transformers' `_assisted_decoding`, with a model or with `prompt_lookup_num_tokens`. None if not served."""
    reason = why_not_request(input_ids, config, kwargs) or why_not_model(model)
    lookup = config.prompt_lookup_num_tokens
    if not reason and config.return_dict_in_generate and len(input_ids) == 1:
        reason = "an assistant with return_dict_in_generate"  # transformers serves no batch with an assistant
    elif not reason and (config.assistant_ensemble_weight is not None or config.assistant_early_exit is not None):
        reason = "another kind of assistance"
    elif not reason and assistant is not None:
        other = engine_decodes(assistant) and assistant is not model
        reason = f"assistant: {why_not_model(assistant) if other else type(assistant).__name__}"  # type: ignore[arg-type]
        reason = "" if reason == "assistant: " else reason
    elif not reason and lookup is None:
        reason = "another kind of assistance"
    if reason:
        report_on(model, GenerationReport("transformers", reason))
        return None
    check_ids(input_ids, model.model.embed_tokens.num_embeddings, "input_ids")
    most = MOST_DRAFTED if assistant is not None else min(lookup, MOST_DRAFTED)  # type: ignore[type-var]
    wanted = "lookup" if assistant is None else assistant
    return _generated(model, input_ids, processors, criteria, config, streamer, kwargs, wanted, most)


def _report(model: PreTrainedModel, engine: DecodeEngine, speculation: Speculation | None = None) -> None:
    # The activation of a gated MLP has no zeros that the engine could skip.
    counts = (0, 0) if engine.weights.constants.gated else (engine.active_neurons, engine.seen_neurons)
    report_on(model, GenerationReport(engine.name, "", *counts, speculation))


def _hand_over(kv: KeyValues, starts: list[int], cache: DynamicCache) -> None:
    """Copy keys and values into transformers' cache, padded on the left as the prompts were."""
    length = starts[0] + kv.lengths[0]
    for index, pair in enumerate(zip(kv.keys, kv.values, strict=True)):
        padded = [part.new_zeros((len(starts), part.shape[1], length, part.shape[3])) for part in pair]
        for slot, start in enumerate(starts):
            for out, part in zip(padded, pair, strict=True):
                out[slot, :, start:length] = part[slot, :, : length - start]
        cache.update(padded[0], padded[1], index)
