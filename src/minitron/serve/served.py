"""The models of a server: each with its name, its tokenizer, and the engine that runs it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ..chat import TURN_MARK
from ..checkpoint.limits import MAX_CONFIG_BYTES, read_json
from ..checkpoint.lora import read_low_rank
from ..checkpoint.sources import adapted_model
from ..config import NemotronConfig
from ..dtypes import parse_dtype
from ..engine.base import DecodeEngine
from ..engine.engines import open_engine
from ..engine.model_weights import decodes_on_cuda, weights_of
from ..engine.models import why_not_model
from ..engine_hook import engine_choice
from ..families import FAMILIES
from ..family_models import causal_lm_class
from ..loading import checkpoint_folder, load, pick_device
from ..memory import available_memory
from ..templates import render_conversation
from ..tokenizer import load_tokenizer
from .adapters import adapter_folder, with_adapter
from .classifiers import ServedClassifier, load_classifier
from .engine_loop import EngineLoop
from .errors import ApiError, shown
from .guard import guard_path, load_guard
from .scheduler import CHUNK, Scheduler
from .settings import ServeSettings
from .tool_prompt import needs_prompt, with_tool_prompt

LARGEST_DEFAULT_CONTEXT = 8192
GPU_CHUNK = 256
"""Prompt tokens in one prefill between two decode steps on a GPU, where a chunk of 32 would read all weights for as
long as a decode step does."""
TURN_ENDS = (TURN_MARK, "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>")
"""Tokens that end an assistant's turn in the chat templates that are known."""


@dataclass(eq=False)
class ServedModel:
    """A language model that answers requests."""

    name: str
    tokenizer: Any
    model: nn.Module
    context: int
    """Largest number of tokens of a prompt with its answer."""
    vocabulary: int
    scheduler: Scheduler
    reason: str = ""
    """Why no engine runs the model; empty if one does."""
    ends: frozenset[int] = frozenset()
    """Tokens that end a text."""
    chat_ends: frozenset[int] = frozenset()
    """Tokens that end an assistant's turn."""
    _encoding: threading.Lock = field(default_factory=threading.Lock)

    @property
    def engine_name(self) -> str:
        """ "cpu", "cuda", "reference" or "transformers"."""
        return self.scheduler.engine.name

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of a text; with the special tokens that the tokenizer puts around one if `special`."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return list(backend.encode(text, add_special_tokens=special).ids)
        with self._encoding:
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return backend.decode(list(ids), skip_special_tokens=True)
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def render(self, messages: Sequence[dict[str, Any]], tools: Sequence[dict[str, Any]] | None, prompt: bool) -> str:
        """A conversation as text, by the checkpoint's template in its sandbox.

        Raises:
            ApiError: there is no template, or it rejects the conversation.
        """
        if self.tokenizer.chat_template is None:
            raise ApiError(
                f"the model {self.name!r} has no chat template; use /v1/completions", param="messages", code="no_chat"
            )
        template = self.tokenizer.chat_template
        if isinstance(template, str) and needs_prompt(template):
            messages, tools = with_tool_prompt(messages, tools), None
        try:
            return render_conversation(self.tokenizer, messages, tools=tools, add_generation_prompt=prompt)
        except ValueError as error:  # ChatTemplateError and templates for several purposes
            raise ApiError(f"messages: {error}", param="messages", code="template_error") from None

    def check_ids(self, ids: Sequence[int], where: str) -> list[int]:
        """The ids as they are.

        Raises:
            ApiError: one is not in the vocabulary.
        """
        wrong = next((index for index in ids if index >= self.vocabulary), None)
        if wrong is not None:
            raise ApiError(f"{where} has the token {wrong}; ids are below {self.vocabulary}", param=where)
        return list(ids)


AnyModel: TypeAlias = ServedModel | ServedClassifier


class Served:
    """All models, and the thread that runs them."""

    def __init__(self, models: Sequence[AnyModel], loop: EngineLoop) -> None:
        self._models = {model.name: model for model in models}
        self.loop = loop

    def __iter__(self) -> Iterator[AnyModel]:
        return iter(self._models.values())

    @property
    def writing(self) -> list[ServedModel]:
        """The language models."""
        return [model for model in self if isinstance(model, ServedModel)]

    def any_of(self, name: str) -> AnyModel:
        """The model of that name.

        Raises:
            ApiError: there is none.
        """
        if name not in self._models:
            raise ApiError(
                f"the model {shown(name)} does not exist; models here are {', '.join(self._models)}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return self._models[name]

    def find(self, name: str | None) -> ServedModel:
        """The language model of that name; the first one if None.

        Raises:
            ApiError: there is none.
        """
        found = next(iter(self.writing), None) if name is None else self.any_of(name)
        if not isinstance(found, ServedModel):
            raise ApiError(f"the model {shown(name)} writes no text; ask it at /classify", param="model")
        return found

    def find_classifier(self, name: str) -> ServedClassifier:
        """The classifier of that name.

        Raises:
            ApiError: there is none.
        """
        found = self.any_of(name)
        if not isinstance(found, ServedClassifier):
            raise ApiError(f"the model {shown(name)} has no classification head", param="model", code="no_classifier")
        return found


def load_models(settings: ServeSettings, say: Callable[[str], object]) -> list[AnyModel]:
    """Load all models of the settings.

    Raises:
        FileNotFoundError, ValueError: a model is missing, wrong or too large, or two have one name.
    """
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    found: list[AnyModel] = []
    bases: dict[Path, tuple[Any, Any]] = {}
    for given in settings.models:
        name, path = name_and_path(given)
        if name in {model.name for model in found}:
            raise ValueError(f"two models are named {name!r}; give one another name: NAME={path}")
        adapter = adapter_folder(path) if settings.adapters == "shared" else None
        if adapter is not None:
            found.append(load_adapter(name, adapter, bases, settings, say))
            continue
        classifier = load_classifier(name, path, settings.device, say)
        found.append(classifier or load_model(name, path, settings, say))
        if isinstance(found[-1], ServedModel):
            bases[checkpoint_folder(path, say).resolve()] = found[-1].model, found[-1].tokenizer
    return found


def load_adapter(
    name: str,
    folder: Path,
    bases: dict[Path, tuple[Any, Any]],
    settings: ServeSettings,
    say: Callable[[str], object],
) -> ServedModel:
    """An adapter over the weights of its base model.

    Args:
        name: of the served model.
        folder: the adapter's.
        bases: models with their tokenizers that are in memory, by folder; the adapter's is loaded if it is missing.
        settings: how to serve.
        say: called with sentences.

    Raises:
        CheckpointError, ValueError: the adapter does not fit its base, or cannot be added unmerged.
    """
    if settings.format is not None:
        raise ValueError(f"{folder}: adapters over shared weights need a model without --format; leave one of both out")
    base = checkpoint_folder(adapted_model(folder), say).resolve()
    if base not in bases:
        bases[base] = _load(str(base), settings, say)
    model, tokenizer = bases[base]
    if (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder, vocab_size=model.config.vocab_size)
    parts = read_low_rank(folder, dict(model.named_parameters()))
    adapted = with_adapter(model, parts)
    reason = f"a LoRA adapter over the shared weights of {base.name}"
    return _served(name, adapted, tokenizer, settings, say, reason)


def name_and_path(given: str) -> tuple[str, str]:
    """A model's name and its checkpoint; without NAME= the last part of the path is the name."""
    name, mark, path = given.partition("=")
    if mark and name and path:
        return name, path
    return given.rstrip("/").rsplit("/", 1)[-1], given


def load_model(name: str, path: str, settings: ServeSettings, say: Callable[[str], object]) -> ServedModel:
    """Load one model and open its engine, with room for the longest request in each slot."""
    model, tokenizer = _load(path, settings, say)
    with engine_choice(settings.engine):
        reason = 'engine is "off"' if settings.engine == "off" else why_not_model(model)
        return _served(name, model, tokenizer, settings, say, reason)


def _served(
    name: str, model: Any, tokenizer: Any, settings: ServeSettings, say: Callable[[str], object], reason: str
) -> ServedModel:
    """A model in memory with its engine; `reason` says why that is transformers."""
    longest = model.config.max_position_embeddings
    context = min(longest, settings.max_context or min(longest, LARGEST_DEFAULT_CONTEXT))
    engine = _open(model, context, settings, reason)
    cache = settings.prefix_cache if engine.name != "transformers" else 0
    head = guard_path(settings, name)
    guard = None if head is None else load_guard(head, name, model, tokenizer, settings, say)
    scheduler = Scheduler(
        engine,
        chunk=settings.prefill_chunk or (GPU_CHUNK if engine.device.type == "cuda" else CHUNK),
        cache_bytes=cache,
        most_waiting=settings.max_waiting,
        guard=guard,
    )
    say(f"{name}: {context} tokens of context in each of {settings.slots} slots, engine {engine.name}")
    if reason:
        say(f"{name}: the engine does not run this model ({reason}); transformers does, slower")
    ends = _end_ids(model)
    turn_ends = _known_ids(tokenizer, TURN_ENDS)
    return ServedModel(
        name,
        tokenizer,
        model,
        context,
        model.config.vocab_size,
        scheduler,
        reason,
        ends,
        ends | turn_ends,
    )


def _load(path: str, settings: ServeSettings, say: Callable[[str], object]) -> tuple[Any, Any]:
    """A causal language model of any architecture, and its tokenizer."""
    folder = checkpoint_folder(path, say)
    kind = read_json(folder / "config.json", MAX_CONFIG_BYTES).get("model_type")
    if kind == NemotronConfig.model_type or settings.format is not None:
        loaded = load(folder, dtype=settings.dtype, device=settings.device, format=settings.format, say=say)
        return loaded.model, loaded.tokenizer
    family = FAMILIES.get(str(kind))
    classes: Any = AutoModelForCausalLM if family is None else causal_lm_class(family)
    chosen = parse_dtype(settings.dtype) or "auto"
    model, info = classes.from_pretrained(folder, dtype=chosen, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"{folder}: tensor {sorted(info['missing_keys'])[0]!r} is missing from the checkpoint")
    tokenizer = load_tokenizer(folder, vocab_size=model.config.vocab_size)
    return model.to(pick_device(settings.device)).eval(), tokenizer


def _open(model: Any, context: int, settings: ServeSettings, reason: str) -> DecodeEngine:
    if reason:
        from .transformers_engine import TransformersEngine

        return TransformersEngine(model, context, settings.slots)
    weights = weights_of(model)
    if decodes_on_cuda(model):
        engine = open_engine(weights, context, settings.slots)  # which says what would fit
        engine.prepare()
        return engine
    rows = sum(2 * layer.num_key_value_heads for layer in weights.layers) * weights.constants.head_dim
    needed, left = rows * weights.dtype.itemsize * context * settings.slots, available_memory()
    if left is not None and needed > left:
        raise ValueError(
            f"the KV cache of {settings.slots} slots with {context} tokens each takes {needed / 1e9:.2f} GB, and "
            f"{left / 1e9:.2f} GB of memory are free; use fewer --slots or a smaller --max-context"
        )
    engine = open_engine(weights, context, settings.slots)
    engine.prepare()
    return engine


def _end_ids(model: Any) -> frozenset[int]:
    ends = model.generation_config.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def _known_ids(tokenizer: Any, tokens: Sequence[str]) -> frozenset[int]:
    vocabulary = tokenizer.get_vocab()
    found = {vocabulary[token] for token in tokens if token in vocabulary}
    return frozenset(found if tokenizer.eos_token_id is None else {*found, tokenizer.eos_token_id})
