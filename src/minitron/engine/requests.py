"""What the engine can serve: models and requests that it decodes exactly as transformers' own path would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from ..decoding import ENGINE_CHOICE
from ..model import (
    NemotronAttention,
    NemotronDecoderLayer,
    NemotronForCausalLM,
    NemotronLayerNorm1P,
    NemotronMLP,
)
from ..ops.act import SquaredReLU
from .packed import PackedNemotron
from .weights import WEIGHT_DTYPES

# The frequencies of the other types ("dynamic", "longrope") change with the length of the text.
FIXED_ROTATIONS = ("default", "linear", "yarn", "llama3")
PLAIN_MODULES = (nn.Embedding, nn.Linear, nn.ModuleList, NemotronAttention, NemotronDecoderLayer, NemotronLayerNorm1P)


def why_not_model(model: NemotronForCausalLM) -> str:
    """Why the engine cannot run this model as it is; empty if it can."""
    if isinstance(model, PackedNemotron):
        return ""
    if type(model).forward is not NemotronForCausalLM.forward:
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
        if "forward" in vars(module):
            return f"the forward of a {type(module).__name__} was replaced"
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


KNOWN_ARGUMENTS = {
    "attention_mask",
    "past_key_values",
    "position_ids",
    "logits_to_keep",
    "use_cache",
    "synced_gpus",
    "tokenizer",
}


def why_not_request(input_ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any]) -> str:
    """Why the engine cannot serve this request; empty if it can."""
    if ENGINE_CHOICE.get() == "off":
        return 'engine="off"'
    if config.is_assistant:
        return "a draft for transformers' own loop"
    if not input_ids.numel():
        return "no tokens to begin with"
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            return name
    if not config.use_cache or config.cache_implementation is not None or kwargs.get("synced_gpus"):
        return "a cache of the caller's choice"
    cache = kwargs.get("past_key_values")
    if cache is not None and not isinstance(cache, DynamicCache):
        return f"a {type(cache).__name__}"
    if cache is not None and cache.get_seq_length() > 0:
        return "a cache that is already filled"
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in KNOWN_ARGUMENTS)
    return f"argument {unknown[0]}" if unknown else _why_not_mask(input_ids, kwargs)


def _why_not_mask(input_ids: Tensor, kwargs: dict[str, Any]) -> str:
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is None:
        mask = torch.ones_like(input_ids)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return "an attention mask that is not one of padding"
    if mask.shape != input_ids.shape or ((mask != 0) & (mask != 1)).any():
        return "an attention mask of another shape or with other values than 0 and 1"
    mask = mask.long()
    expected = mask.cumsum(-1) - 1
    # Padding on the left: once a row has begun, it goes on to the end.
    if (mask.diff() < 0).any():
        return "an attention mask with holes"
    if not mask[:, -1].all():
        return "a prompt without tokens"
    if positions is not None and (positions.shape != mask.shape or ((positions != expected) & (mask == 1)).any()):
        return "positions of the caller's choice"
    return ""


def starts_of(input_ids: Tensor, kwargs: dict[str, Any]) -> list[int]:
    """The column at which each prompt begins, behind its padding."""
    mask = kwargs.get("attention_mask")
    return [0] * len(input_ids) if mask is None else (mask == 0).sum(-1).tolist()
