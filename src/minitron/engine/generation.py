"""Where `generate` meets the engine: what the engine can serve, the loop over tokens, and what is said about it.

transformers prepares a request (settings, logits processors, stopping criteria, streamer) and calls `_sample`; if the
model and the request are ones that the engine serves, the loop here runs instead of transformers' own.
"""

from __future__ import annotations

import importlib.util
import threading
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
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

from ..decoding import ENGINE_CHOICE, GenerationReport
from ..model import (
    NemotronAttention,
    NemotronDecoderLayer,
    NemotronForCausalLM,
    NemotronLayerNorm1P,
    NemotronMLP,
    check_ids,
)
from ..ops.act import SquaredReLU
from ..sampling import Choice, choose
from .reference import ReferenceEngine
from .weights import WEIGHT_DTYPES, EngineWeights, from_model

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer

# The frequencies of the other types ("dynamic", "longrope") change with the length of the text.
FIXED_ROTATIONS = ("default", "linear", "yarn", "llama3")
PLAIN_MODULES = (nn.Embedding, nn.Linear, nn.ModuleList, NemotronAttention, NemotronDecoderLayer, NemotronLayerNorm1P)


class Engine(Protocol):
    """What the loop needs of an engine; see `ReferenceEngine`."""

    @property
    def active_neurons(self) -> int:
        """MLP neurons that were not zero."""
        ...

    @property
    def seen_neurons(self) -> int:
        """All MLP neurons."""
        ...

    def read(self, tokens: list[int]) -> None:
        """Append tokens."""

    def step(self, tokens: list[int]) -> Tensor:
        """Append tokens; logits after each."""
        ...

    def close(self) -> None:
        """End threads."""


# --- what can be served ------------------------------------------------------------------------------------------


def why_not_model(model: NemotronForCausalLM) -> str:
    """Why the engine cannot run this model as it is; empty if it can."""
    if type(model).forward is not NemotronForCausalLM.forward or "forward" in vars(model):
        return "the model's forward was replaced"
    if model.training:
        return "the model is in training mode"
    if model.config.rope_parameters["rope_type"] not in FIXED_ROTATIONS:  # type: ignore[index]
        return f"rope_type {model.config.rope_parameters['rope_type']!r}"  # type: ignore[index]
    if model.config._attn_implementation not in (None, "eager", "sdpa"):
        return f"attention implementation {model.config._attn_implementation!r}"
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
            return f"a hook on {type(module).__name__}"
        if isinstance(module, NemotronMLP):
            if not isinstance(module.act_fn, SquaredReLU):
                return f"hidden_act is {model.config.hidden_act!r}"
        elif isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm) and type(module) not in PLAIN_MODULES:
            return f"a {type(module).__name__} in place of a plain layer"
    return _why_not_tensors(model)


def _why_not_tensors(model: NemotronForCausalLM) -> str:
    dtype = model.model.embed_tokens.weight.dtype
    if dtype not in WEIGHT_DTYPES:
        return f"weights in {dtype}"
    for name, tensor in model.named_parameters():
        if tensor.device.type != "cpu" or type(tensor.data) is not Tensor:
            return f"{name} is not a plain tensor on the CPU"
        if tensor.dim() == 2 and (tensor.dtype != dtype or not tensor.is_contiguous()):
            return f"{name} is {tensor.dtype}, other matrices are {dtype}"
    expected = 2 + model.config.num_hidden_layers * (
        6 + 4 * model.config.attention_bias + 2 * model.config.mlp_bias + 4
    )
    expected += 1 if model.config.tie_word_embeddings else 2
    if sum(1 for _ in model.parameters()) != expected:
        return "the model has parameters that are not Nemotron's"
    return ""


def why_not_request(input_ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any]) -> str:
    """Why the engine cannot serve this request; empty if it can."""
    if ENGINE_CHOICE.get() == "off":
        return 'engine="off"'
    if input_ids.shape[0] != 1 or input_ids.shape[1] < 1:
        return f"a batch of {input_ids.shape[0]}"
    for name in ("return_dict_in_generate", "output_attentions", "output_hidden_states"):
        if getattr(config, name):
            return name
    if not config.use_cache or config.cache_implementation is not None or kwargs.get("synced_gpus"):
        return "a cache of the caller's choice"
    mask = kwargs.get("attention_mask")
    if mask is not None and not bool((mask == 1).all()):
        return "an attention mask with holes"
    cache = kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        return "a cache that is already filled"
    known = {
        "attention_mask",
        "past_key_values",
        "position_ids",
        "logits_to_keep",
        "use_cache",
        "synced_gpus",
        "tokenizer",
    }
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in known)
    return f"argument {unknown[0]}" if unknown else ""


# --- packed weights, once per model ------------------------------------------------------------------------------

_packed: weakref.WeakKeyDictionary[nn.Module, tuple[Any, EngineWeights]] = weakref.WeakKeyDictionary()
_packing = threading.Lock()


def weights_of(model: NemotronForCausalLM) -> EngineWeights:
    """The model's weights, packed at the first call and again whenever they have changed."""
    now = _fingerprint(model)
    with _packing:
        found = _packed.get(model)
        if found is None or found[0] != now:
            found = now, from_model(model)
            _packed[model] = found
        return found[1]


def _fingerprint(model: NemotronForCausalLM) -> tuple[Any, ...]:
    # Versions count in-place changes, but not those made through `.data`: hence some values of what is copied.
    tensors = [(t.data_ptr(), t._version) for t in model.parameters()]
    samples = [
        part.detach().flatten()[:: max(1, part.numel() // 64)].float().sum().item()
        for name, part in model.named_parameters()
        if part.dim() == 1 or name.endswith("down_proj.weight")
    ]
    return (*tensors, *samples)


def open_engine(weights: EngineWeights, capacity: int) -> Engine:
    """The compiled engine, or the reference where Numba is missing."""
    if importlib.util.find_spec("numba") is None:
        return ReferenceEngine(weights, capacity)
    from .cpu import CpuEngine

    return CpuEngine(weights, capacity)


# --- the loop ----------------------------------------------------------------------------------------------------


def sample(
    model: NemotronForCausalLM,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """As transformers' `_sample`, for one prompt: the prompt and what follows it, (1, T). None if not served.

    Sets `model.last_generation` either way.

    Raises:
        ValueError: ids outside the vocabulary.
    """
    reason = why_not_request(input_ids, config, kwargs) or why_not_model(model)
    if reason:
        model.last_generation = GenerationReport("transformers", reason)
        return None
    check_ids(input_ids, model.model.embed_tokens.num_embeddings, "input_ids")
    engine = open_engine(weights_of(model), config.max_length)  # type: ignore[arg-type]
    try:
        ids = _decode(engine, input_ids, processors, criteria, config, streamer)
    finally:
        engine.close()
    name = "reference" if isinstance(engine, ReferenceEngine) else "cpu"
    model.last_generation = GenerationReport(name, "", engine.active_neurons, engine.seen_neurons)
    if streamer is not None:
        streamer.end()
    return ids


def _decode(
    engine: Engine,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: BaseStreamer | None,
) -> Tensor:
    choice = choice_of(processors, bool(config.do_sample))
    ends = {int(end) for rule in criteria if hasattr(rule, "eos_token_id") for end in rule.eos_token_id}  # type: ignore[attr-defined]
    other = [rule for rule in criteria if not hasattr(rule, "eos_token_id") and not hasattr(rule, "max_length")]
    limit: int = config.max_length  # type: ignore[assignment]
    length = input_ids.shape[1]
    ids = torch.empty((1, max(limit, length + 1)), dtype=torch.long)
    ids[:, :length] = input_ids
    ids_array = ids.numpy()[0]
    token = int(ids_array[length - 1])
    engine.read(ids_array[: length - 1].tolist())
    while True:
        logits = engine.step([token])
        if choice is None:
            scores = processors(ids[:, :length], logits.clone())[0]  # type: ignore[arg-type]
            token = int(torch.multinomial(scores.softmax(-1), 1) if config.do_sample else scores.argmax())
        else:
            token = choose(logits[0].numpy(), choice, ids_array[:length])
        ids_array[length] = token
        length += 1
        if streamer is not None:
            streamer.put(ids[0, length - 1 : length])
        done = length >= limit or token in ends
        for rule in other:
            done = bool(rule(ids[:, :length], None).all()) or done  # type: ignore[arg-type]
        if done:
            return ids[:, :length].clone()


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
