"""Which draft a request gets, whether it is worth its copy of the weights, and what earlier texts have shown of it.

A model's own draft is a copy of its weights in int4. Making it takes as long as decoding dozens of tokens, so it is
made only where the copy is expected to save that time: within one text, or in this text and those before it together.
"""

from __future__ import annotations

import copy
import threading
import time
import weakref
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..assets import default_draft
from ..engine_hook import Speculation
from ..family_models import engine_decodes
from .base import DecodeEngine
from .draft_length import DraftLength, DraftLengths
from .drafts import Draft, Lookup, ModelDraft
from .engines import open_engine
from .model_weights import GenerationOnly, has_copies, weights_of
from .models import why_not_model
from .rules import Rules
from .speculate import Speculator, decode_with_draft
from .texts import Texts
from .weights import EngineWeights, from_checkpoint, weight_bytes

SELF_DRAFT_FORMAT = "int4"
"""In which a model drafts for itself."""
COPIED_PER_SECOND = 50e6
"""Weights that are packed in a second; a first guess, replaced by what the last copy took."""
SUMMED_PER_SECOND = 8e9
"""Bytes of weights whose checksum takes a second; a guess. A copy that exists is compared with the model's weights."""


@dataclass
class _Learned:
    """What texts with one kind of draft have shown."""

    length_rules: DraftLengths | None = None
    unsaved: float = 0.0
    """Seconds that the draft would have saved in texts that were decoded without it."""


_learned: weakref.WeakKeyDictionary[nn.Module, dict[object, _Learned]] = weakref.WeakKeyDictionary()
_learning = threading.Lock()


@dataclass
class _Pace:
    """How fast weights are packed here."""

    per_second: float = field(default=COPIED_PER_SECOND)


_pace = _Pace()


def why_not_drafted(rules: Rules, starts: list[int], engine: DecodeEngine) -> str:
    """Why these prompts, which begin at the columns `starts`, are decoded without drafts; empty if drafts help them."""
    if len(starts) == 1 and not starts[0]:
        return ""
    most = engine.most_rows // 2
    if not engine.drafts_batches:
        return f"a batch or padding on the engine {engine.name!r}"
    if not rules.known:
        return "a batch or padding with logits processors of the caller's own"
    return f"more than {most} texts" if len(starts) > most else ""


def speculate(
    model: PreTrainedModel,
    engine: DecodeEngine,
    input_ids: Tensor,
    starts: list[int],
    rules: Rules,
    wanted: object,
    most: int,
    streamer: BaseStreamer | None,
) -> tuple[Tensor, Speculation]:
    """Prompts and their continuations (B, T), and what speculation achieved.

    Args:
        model: the engine's.
        engine: open, with empty sequences.
        input_ids: the prompts (B, T), for which `why_not_drafted` has no reason.
        starts: the column at which each prompt begins.
        rules: of the request.
        wanted: see `NemotronForCausalLM.generate`.
        most: the largest number of tokens to draft at a time.
        streamer: gets the tokens.

    Raises:
        ValueError: the draft does not fit the model.
    """
    draft, key = _draft_for(model, engine, rules, wanted, len(starts))
    try:
        if not rules.known:
            # A drawn draft's length decides which random numbers are used, so it must not depend on the clock.
            measure = key == "lookup" or not rules.sampling
            return decode_with_draft(
                engine, draft, input_ids, rules, DraftLength(draft.cost, most, measure=measure), streamer
            )
        with _learning:
            learned = copy.copy(_learned.setdefault(model, {}).get((key, rules.sampling), _Learned()))
        if learned.length_rules is None:
            length_rules = DraftLengths(draft.cost, DraftLength)
        else:
            length_rules = copy.deepcopy(learned.length_rules)
        texts = Texts(input_ids, starts, rules, streamer)
        speculator = Speculator(engine, draft, texts, rules, length_rules, most, learned.unsaved)
        ids = speculator.run()
        learned.length_rules, learned.unsaved = length_rules, speculator.unsaved
        with _learning:
            _learned[model][key, rules.sampling] = learned
        return ids, speculator.found
    finally:
        if isinstance(draft, ModelDraft):
            draft.close()


def _draft_for(
    model: PreTrainedModel, engine: DecodeEngine, rules: Rules, wanted: object, slots: int
) -> tuple[Draft, object]:
    """The draft of so many texts, and what distinguishes it from the model's other ones."""
    if wanted == "lookup":
        return Lookup(), "lookup"
    found = draft_weights(model, wanted)
    if found is None:
        return _own_draft(model, engine, rules, slots), "self"
    if engine.name == "cuda":
        from .cuda.weights import on_device

        found = on_device(found, engine.device)
    cost = found.bytes_per_token() / engine.weights.bytes_per_token()
    return ModelDraft(lambda: open_engine(found, rules.limit, slots), engine, rules, cost), id(wanted)


def _own_draft(model: PreTrainedModel, engine: DecodeEngine, rules: Rules, slots: int) -> ModelDraft:
    """A draft of the model's own weights, which are copied when it is first used."""
    ready = has_copies(model, SELF_DRAFT_FORMAT)
    total = engine.weights.nbytes
    size = weight_bytes(model.config, SELF_DRAFT_FORMAT)
    count = sum(parameter.numel() for parameter in model.parameters())
    seconds = total / SUMMED_PER_SECOND if ready else count / _pace.per_second

    def opened() -> DecodeEngine:
        start = time.perf_counter()
        weights = weights_of(model, SELF_DRAFT_FORMAT)
        if not ready:
            _pace.per_second = count / (time.perf_counter() - start)
        alike = weights.plain_format == engine.kv.format  # int4 weights of an fp32 model have keys and values in bf16
        return open_engine(weights, rules.limit, slots, engine.kv if alike else None)

    return ModelDraft(opened, engine, rules, size / total, seconds)


def check_draft(draft: object) -> None:
    """Refuse what cannot be a draft.

    Raises:
        ValueError: it is none.
    """
    named = isinstance(draft, str) and draft in ("default", "lookup", "self")
    if not named and not isinstance(draft, EngineWeights) and not engine_decodes(draft):
        raise ValueError(
            f"draft is {draft!r}; it must be 'default', 'lookup', 'self', a loaded model or its EngineWeights"
        )


def draft_weights(model: PreTrainedModel, draft: object) -> EngineWeights | None:
    """The weights of another model that drafts; None if the model is to draft for itself.

    Raises:
        ValueError: the draft does not fit the model.
    """
    vocabulary = model.model.embed_tokens.weight.shape[0]
    check_draft(draft)
    if draft == "default":
        smaller = default_draft(model.name_or_path or "")
        draft = "self" if smaller is None else _draft_of(smaller, (smaller / "model.safetensors").stat().st_mtime_ns)
        if isinstance(draft, EngineWeights) and draft.vocab_size != vocabulary:
            draft = "self"  # the model is the bundled one no longer
    if draft == "self":
        if isinstance(model, GenerationOnly):
            return weights_of(model, SELF_DRAFT_FORMAT)  # refused in another format
        return None
    if engine_decodes(draft):
        reason = why_not_model(draft)
        if reason:
            raise ValueError(f"draft: the engine does not run this model: {reason}")
        draft = weights_of(draft)
    assert isinstance(draft, EngineWeights), "not one of a draft's kinds"
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
