"""Which models the engine can serve: those whose modules compute exactly what it computes.

Every module that a forward pass goes through is looked at before each call of `generate`: its type, its `forward`, its
hooks, and the numbers that its `forward` takes from it. A model that is not as this package made it runs in torch.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import PreTrainedModel

from ..families import FAMILIES, Family, family_of
from ..family_models import causal_lm_class, class_prefix
from ..ops.autocast import autocast_dtype
from ..written_code import CLASSES, replaced_code
from .cuda.device import why_not_dtype
from .matrix import CUDA_FORMATS
from .model_weights import GenerationOnly, decodes_on_cuda, weights_of
from .snapshot import MOST_BYTES, Snapshot
from .weights import EMBEDDING, HEAD, NORM, WEIGHT_DTYPES, norm_eps, parts_of, tensors_of

# The frequencies of the other types ("dynamic", "longrope") change with the length of the text.
FIXED_ROTATIONS = ("default", "linear", "yarn", "llama3")
ATTENTIONS = (None, "eager", "sdpa")
SAME_IN_TRAINING = ("Linear", "Embedding", "SquaredReLU", "SiLU", "LayerNorm1P", "RMSNorm", "RotaryEmbedding", "MLP")
"""Ends of the names of modules that compute the same in training mode, in which every new module is."""
PREPARATION = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
"""Methods of transformers between a request and `forward`, which the engine does not call."""

_served: weakref.WeakKeyDictionary[nn.Module, Snapshot] = weakref.WeakKeyDictionary()
"""Small models as they were when the CPU engine could last run them."""


def why_not_model(model: PreTrainedModel) -> str:
    """Why the engine cannot run this model as it is now; empty if it can."""
    generation_only = isinstance(model, GenerationOnly)
    reason = _why_not_code(model, generation_only)
    if reason or generation_only or decodes_on_cuda(model):
        return reason or _why_not_parts(model, generation_only)
    before = _served.get(model)
    if before is not None and before.holds(model):
        return _why_not_context(model)
    _served.pop(model, None)
    reason = _why_not_parts(model, generation_only)
    if not reason and sum(x.nbytes for x in model.parameters()) <= MOST_BYTES:
        _served[model] = Snapshot(model)
    return reason


def _why_not_parts(model: PreTrainedModel, generation_only: bool) -> str:
    reason = (
        ("" if generation_only else _why_not_devices(model))
        or _why_not_modules(model, generation_only)
        or _why_not_constants(model)
    )
    if generation_only:
        return reason or _why_not_format(model)
    return reason or _why_not_context(model) or _why_not_tensors(model)


def _why_not_code(model: PreTrainedModel, generation_only: bool) -> str:
    replaced = replaced_code()
    if replaced:
        return f"{replaced} was replaced"
    family = FAMILIES.get(getattr(model.config, "model_type", ""))
    if family is None:
        return f"model_type is {getattr(model.config, 'model_type', None)!r}"
    if not generation_only and type(model) is not causal_lm_class(family):
        return f"the model is a {type(model).__name__}, not a {family.architecture} of this package"
    for name in PREPARATION:
        if name in vars(model):
            return f"the model's {name} was replaced"
    if nn.modules.module._has_any_global_hook():
        return "a hook on all modules"
    return ""


def _why_not_devices(model: PreTrainedModel) -> str:
    """Weights that are spread over several devices, or on one for which there is no engine."""
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        return f"its weights are on {' and '.join(devices)}, and an engine needs them on one device (device_map)"
    if devices and torch.device(devices[0]).type not in ("cpu", "cuda"):
        return f"its weights are on {devices[0]}, and the engines run on a CPU or a CUDA device"
    return ""


def _why_not_format(model: PreTrainedModel) -> str:
    """A format of weights that the engine for a GPU does not read."""
    if not decodes_on_cuda(model):
        return ""
    format = weights_of(model).format
    if format not in CUDA_FORMATS:
        return f"weights in {format}, and the CUDA engine reads {', '.join(CUDA_FORMATS)}"
    return ""


def _why_not_context(model: PreTrainedModel) -> str:
    """Modes of torch that change every operation of a forward pass."""
    if autocast_dtype(model.model.embed_tokens.weight) is not None:
        return "autocast"
    for mode in (*_get_current_dispatch_mode_stack(), *_get_current_function_mode_stack()):
        if not isinstance(mode, DeviceContext):  # which only chooses where new tensors are allocated
            return f"a {type(mode).__name__}"
    return ""


# --- modules -----------------------------------------------------------------------------------------------------


def _why_not_modules(model: PreTrainedModel, generation_only: bool) -> str:
    body, family = model.model, family_of(model.config)
    prefix, norm = class_prefix(family), norm_class(family)
    reason = (
        _why_not_module(model, None if generation_only else type(model))
        or _why_not_module(body, CLASSES[f"{prefix}Model"])
        or _why_not_module(body.embed_tokens, CLASSES["Embedding"])
        or _why_not_module(body.norm, norm)
        or _why_not_module(body.rotary_emb, CLASSES[f"{prefix}RotaryEmbedding"])
        or _why_not_module(model.lm_head, CLASSES["Linear"])
    )
    if reason:
        return reason
    if type(body.layers) is not nn.ModuleList:
        return f"the layers are a {type(body.layers).__name__}, not a ModuleList"
    act = CLASSES["SiLU" if family.gated else "SquaredReLU"]
    layers: list[Any] = list(body.layers)
    for layer in layers:
        reason = (
            _why_not_module(layer, CLASSES[f"{prefix}DecoderLayer"])
            or _why_not_module(layer.self_attn, CLASSES[f"{prefix}Attention"])
            or _why_not_module(layer.mlp, CLASSES[f"{prefix}MLP"])
        )
        if reason:
            return reason
        if type(layer.mlp.act_fn) is not act:
            name, usual = model.config.hidden_act, "silu" if family.gated else "relu2"
            return f"hidden_act is {name!r}" if name != usual else f"the activation is {layer.mlp.act_fn!r}"
        for name, module in (*parts_of(layer, family), ("", layer.mlp.act_fn)):
            kind = norm if name.endswith("norm") else CLASSES["Linear"] if name else act
            reason = _why_not_module(module, kind)
            if reason:
                return reason
    return ""


def norm_class(family: Family) -> type[nn.Module]:
    """The class of a family's norms."""
    return CLASSES[class_prefix(family) + {"layernorm1p": "LayerNorm1P", "rmsnorm": "RMSNorm"}[family.norm.kind]]


def _why_not_module(module: nn.Module, kind: type[nn.Module] | None) -> str:
    if kind is not None and type(module) is not kind:
        return f"{type(module).__name__} in place of {kind.__name__}"
    state = vars(module)
    if "forward" in state or "_hf_hook" in state:
        return f"the forward of a {type(module).__name__} was replaced"
    if state["training"] and not (kind is not None and kind.__name__.endswith(SAME_IN_TRAINING)):
        return f"a {type(module).__name__} is in training mode"
    for hooks in (state["_forward_hooks"], state["_forward_pre_hooks"]):
        if any(not _only_looks(hook) for hook in hooks.values()):
            return f"a hook on {type(module).__name__}"
    return ""


def _only_looks(hook: Any) -> bool:
    """Whether a hook is one that transformers leaves on modules whose outputs a caller once asked for."""
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def _why_not_constants(model: PreTrainedModel) -> str:
    """Numbers that each module has, of which the engine has one for all or a fixed one."""
    body = model.model
    rotary = body.rotary_emb
    if rotary.rope_type not in FIXED_ROTATIONS:
        return f"rope_type {rotary.rope_type!r}"
    if rotary.inv_freq.dim() != 1 or rotary.inv_freq.is_meta or not _is_number(rotary.attention_scaling):
        return "a rotation of another form"
    if body.embed_tokens.max_norm is not None:
        return "the embedding has a max_norm"
    if not getattr(model.config, "is_causal", True):
        return "config.is_causal is False"
    if getattr(model.config, "bidirectional_layers", None):
        return "config.bidirectional_layers is set"
    eps, family = norm_eps(body.norm), family_of(model.config)
    if not _is_number(eps):
        return f"the last norm's eps is {eps!r}"
    layers: list[Any] = list(body.layers)
    for index, layer in enumerate(layers):
        for name, norm in parts_of(layer, family):
            if name.endswith("norm") and (not _is_number(norm_eps(norm)) or norm_eps(norm) != eps):
                return "norms with several eps"
        reason = _why_not_attention(layer.self_attn, index, layers[0].self_attn.head_dim)
        if reason:
            return reason
        if 2 * rotary.inv_freq.numel() > layer.self_attn.head_dim:
            return "a rotation of more channels than a head has"
    return ""


def _why_not_attention(attention: Any, index: int, head_dim: int) -> str:
    implementation = attention.config._attn_implementation
    if implementation not in ATTENTIONS:
        return f"attention implementation {implementation!r}"
    if attention.head_dim != head_dim:
        return "attention with several head_dim"
    if not _is_number(attention.scaling) or attention.scaling != head_dim**-0.5:
        return f"the scaling of an attention is {attention.scaling}"
    if not attention.is_causal:
        return "the is_causal of an attention is False"
    if attention.layer_idx != index:
        return f"layer {index} has layer_idx {attention.layer_idx}"
    return ""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


# --- tensors -----------------------------------------------------------------------------------------------------


def _why_not_tensors(model: PreTrainedModel) -> str:
    tensors = tensors_of(model)
    embedding = model.model.embed_tokens.weight
    dtype, device = embedding.dtype, embedding.device
    if dtype not in WEIGHT_DTYPES and not (decodes_on_cuda(model) and dtype == torch.float16):
        return f"weights in {dtype}"
    lacking = why_not_dtype(dtype, device)
    if lacking:
        return lacking
    expected = _shapes(model, tensors)
    for name, tensor in tensors.items():
        if type(tensor) is not Tensor or tensor.device != device or tensor.layout is not torch.strided:
            return f"{name} is not a plain tensor on {'the CPU' if device.type == 'cpu' else device}"
        if tensor.dtype != dtype and ("norm" not in name or not tensor.is_floating_point()):
            return f"{name} is {tensor.dtype}, the embedding is {dtype}"
        if tuple(tensor.shape) != expected.get(name):
            return f"{name} has the shape {list(tensor.shape)}" if name in expected else f"there is a {name}"
        if tensor.dim() == 2 and not tensor.is_contiguous():
            return f"{name} is not contiguous"
    missing = [name for name in expected if name not in tensors and not name.endswith("proj.bias")]
    return f"there is no {missing[0]}" if missing else ""


def _shapes(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors that `tensors_of` may return, by name, from the model's widths and numbers of heads."""
    family = family_of(model.config)
    V, D = model.model.embed_tokens.weight.shape
    found: dict[str, tuple[int, ...]] = {f"{EMBEDDING}.weight": (V, D), f"{HEAD}.weight": (V, D)}
    found |= dict.fromkeys([f"{NORM}.weight", *([f"{NORM}.bias"] if family.norm.bias else [])], (D,))
    layers: list[Any] = list(model.model.layers)
    F = layers[0].mlp.up_proj.weight.shape[0] if layers else 0
    for index, layer in enumerate(layers):
        at, H = f"model.layers.{index}.", layer.self_attn.head_dim
        K = tensors[f"{at}self_attn.k_proj.weight"].shape[0] // H
        queries = K * layer.self_attn.num_key_value_groups * H
        sizes = {"channels": D, "queries": queries, "keys": K * H, "neurons": F, "head_dim": H}
        for part in family.layer:
            rows = sizes[part.rows]
            found[f"{at}{part.name}.weight"] = (rows,) if part.columns is None else (rows, sizes[part.columns])
            if part.bias:
                found[f"{at}{part.name}.bias"] = (rows,)
    return found
