"""Where `generate` meets the engine: it gets the model's weights, chooses the loop and reports what ran.

transformers prepares a request (settings, logits processors, stopping criteria, streamer) and calls `_sample`, or
`_assisted_decoding` if there is an assistant. If the engine can serve the model and the request, the loops of this
package (`loop`, `speculate`) run instead of transformers' own.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..assets import default_draft
from ..engine_hook import DRAFT_CHOICE, GenerationReport, Speculation, report_on
from ..family_models import engine_decodes
from ..finite import NotFiniteError, explain
from ..framework import CACHE_NAME
from ..model import check_ids
from .base import DecodeEngine
from .kv import KeyValues
from .loop import Record, decode
from .model_weights import weights_of
from .models import why_not_model
from .reference import ReferenceEngine
from .requests import starts_of, why_not_request
from .rules import Rules
from .speculate import MOST_DRAFTED, Draft, DraftLength, Lookup, ModelDraft, decode_with_draft
from .weights import EngineWeights, from_checkpoint

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

SELF_DRAFT_FORMAT = "int4"
"""In which a model drafts for itself."""


def open_engine(weights: EngineWeights, capacity: int, slots: int = 1) -> DecodeEngine:
    """The compiled engine, or the reference where Numba is missing."""
    if importlib.util.find_spec("numba") is None:
        return ReferenceEngine(weights, capacity, slots)
    from .cpu.engine import CpuEngine

    return CpuEngine(weights, capacity, slots=slots)


def prepare(model: object, draft: object = None) -> None:
    """Copy a model's weights and compile what decoding with it needs, so that its first token need not wait for that.

    A compilation that takes long is logged. Where the engine does not run, nothing is done.

    Args:
        model: any model.
        draft: see `NemotronForCausalLM.generate`.

    Raises:
        ValueError: the draft does not fit the model.
    """
    if not engine_decodes(model) or why_not_model(model):
        return
    parts = [weights_of(model)]
    if draft not in (None, "lookup"):
        parts.append(_draft_weights(model, draft))
    for weights in parts:
        open_engine(weights, 1).prepare()


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
    rules = Rules(processors, criteria, config, len(input_ids))
    starts = starts_of(input_ids, kwargs)
    draft = DRAFT_CHOICE.get()
    if draft is not None and len(starts) == 1 and not starts[0] and not config.return_dict_in_generate:
        return _speculate(model, input_ids, rules, draft, MOST_DRAFTED, streamer)
    engine = open_engine(weights_of(model), rules.limit, len(starts))
    record = Record() if config.return_dict_in_generate else None
    cache = kwargs.get("past_key_values")
    hand_over = record is not None or getattr(cache, "_is_user_defined", False)
    try:
        ids = decode(engine, input_ids, starts, rules, streamer, record, whole=hand_over)
    except NotFiniteError as error:
        raise explain(error, model) from None
    finally:
        engine.close()
    _report(model, engine)
    if streamer is not None:
        streamer.end()
    if hand_over:
        cache = DynamicCache(config=model.config) if cache is None else cache
        _hand_over(engine.kv, starts, cache)
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
) -> Tensor | None:
    """As transformers' `_assisted_decoding`, with a model or with `prompt_lookup_num_tokens`. None if not served."""
    reason = why_not_request(input_ids, config, kwargs) or why_not_model(model)
    lookup = config.prompt_lookup_num_tokens
    if not reason and (config.return_dict_in_generate or len(input_ids) > 1 or any(starts_of(input_ids, kwargs))):
        reason = "an assistant with return_dict_in_generate, a batch or padding"
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
    rules = Rules(processors, criteria, config)
    most = MOST_DRAFTED if assistant is not None else min(lookup, MOST_DRAFTED)  # type: ignore[type-var]
    return _speculate(model, input_ids, rules, "lookup" if assistant is None else assistant, most, streamer)


def _speculate(
    model: PreTrainedModel,
    input_ids: Tensor,
    rules: Rules,
    draft: object,
    most: int,
    streamer: BaseStreamer | None,
) -> Tensor:
    weights = weights_of(model)
    engines = [open_engine(weights, rules.limit)]
    try:
        helper: Draft = Lookup()
        if draft != "lookup":
            drafting = _draft_weights(model, draft)
            engines.append(open_engine(drafting, rules.limit))
            cost = drafting.bytes_per_token() / weights.bytes_per_token()
            helper = ModelDraft(engines[1], engines[0], rules, cost)
        # A drawn draft's length decides which random numbers are used, so it must not depend on the clock.
        length = DraftLength(helper.cost, most, measure=draft == "lookup" or not rules.sampling)
        ids, found = decode_with_draft(engines[0], helper, input_ids, rules, length, streamer)
    except NotFiniteError as error:
        raise explain(error, model) from None
    finally:
        for engine in engines:
            engine.close()
    _report(model, engines[0], found)
    if streamer is not None:
        streamer.end()
    return ids


def _draft_weights(model: PreTrainedModel, draft: object) -> EngineWeights:
    vocabulary = model.model.embed_tokens.weight.shape[0]
    if draft == "default":
        smaller = default_draft(model.name_or_path or "")
        draft = "self" if smaller is None else _draft_of(smaller, (smaller / "model.safetensors").stat().st_mtime_ns)
        if isinstance(draft, EngineWeights) and draft.vocab_size != vocabulary:
            draft = "self"  # the model is the bundled one no longer
    if draft == "self":
        return weights_of(model, SELF_DRAFT_FORMAT)
    if engine_decodes(draft):
        reason = why_not_model(draft)
        if reason:
            raise ValueError(f"draft: the engine does not run this model: {reason}")
        draft = weights_of(draft)
    if not isinstance(draft, EngineWeights):
        raise ValueError(
            f"draft is {draft!r}; it must be 'default', 'lookup', 'self', a loaded model or its EngineWeights"
        )
    if draft.vocab_size != vocabulary:
        raise ValueError(
            f"draft: its vocabulary has {draft.vocab_size} tokens, the model's {vocabulary}; "
            f"both must have the same tokenizer"
        )
    return draft


@lru_cache(maxsize=1)
def _draft_of(folder: Path, changed: int) -> EngineWeights:
    """The weights of a checkpoint; `changed`, a time in nanoseconds, is a part of the cache's key."""
    return from_checkpoint(folder)


def _report(model: PreTrainedModel, engine: DecodeEngine, speculation: Speculation | None = None) -> None:
    # The activation of a gated MLP has no zeros that the engine could skip.
    counts = (0, 0) if engine.weights.constants.gated else (engine.active_neurons, engine.seen_neurons)
    report_on(model, GenerationReport(engine.name, "", *counts, speculation))


def _hand_over(kv: KeyValues, starts: list[int], cache: DynamicCache) -> None:
    """Copy keys and values into transformers' cache, padded on the left as the prompts were."""
    length = starts[0] + kv.lengths[0]
    for index, pair in enumerate(zip(kv.keys, kv.values, strict=True)):
        padded = [torch.zeros((*part.shape[:2], length, part.shape[3]), dtype=part.dtype) for part in pair]
        for slot, start in enumerate(starts):
            for out, part in zip(padded, pair, strict=True):
                out[slot, :, start:length] = part[slot, :, : length - start]
        cache.update(padded[0], padded[1], index)
