"""THE table of parameter names: Hugging Face, Megatron / NeMo, GGUF; the shapes that a config asks for; QKV rows.

Nothing else in this package spells a tensor's name in a second way. Sources: transformers' modeling_nemotron.py,
megatron-core's GPTModel (Transformer Engine spec), llama.cpp's gguf-py tensor_mapping.py.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from minitron.shapes import describe

from .limits import CheckpointError

if TYPE_CHECKING:
    from minitron.config import ModelConfig

# Hugging Face, Megatron (after `model.` or `module.`), GGUF. `+q` marks a third of Megatron's fused QKV matrix.
_GLOBAL = (
    ("model.embed_tokens.weight", "embedding.word_embeddings.weight", "token_embd.weight"),
    ("model.norm.weight", "decoder.final_layernorm.weight", "output_norm.weight"),
    ("model.norm.bias", "decoder.final_layernorm.bias", "output_norm.bias"),
    ("lm_head.weight", "output_layer.weight", "output.weight"),
)
_PER_LAYER = (
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight", "attn_norm.weight"),
    ("input_layernorm.bias", "self_attention.linear_qkv.layer_norm_bias", "attn_norm.bias"),
    ("self_attn.q_proj.weight", "self_attention.linear_qkv.weight+q", "attn_q.weight"),
    ("self_attn.q_proj.bias", "self_attention.linear_qkv.bias+q", "attn_q.bias"),
    ("self_attn.k_proj.weight", "self_attention.linear_qkv.weight+k", "attn_k.weight"),
    ("self_attn.k_proj.bias", "self_attention.linear_qkv.bias+k", "attn_k.bias"),
    ("self_attn.v_proj.weight", "self_attention.linear_qkv.weight+v", "attn_v.weight"),
    ("self_attn.v_proj.bias", "self_attention.linear_qkv.bias+v", "attn_v.bias"),
    ("self_attn.o_proj.weight", "self_attention.linear_proj.weight", "attn_output.weight"),
    ("self_attn.o_proj.bias", "self_attention.linear_proj.bias", "attn_output.bias"),
    ("post_attention_layernorm.weight", "mlp.linear_fc1.layer_norm_weight", "ffn_norm.weight"),
    ("post_attention_layernorm.bias", "mlp.linear_fc1.layer_norm_bias", "ffn_norm.bias"),
    ("mlp.up_proj.weight", "mlp.linear_fc1.weight", "ffn_up.weight"),
    ("mlp.up_proj.bias", "mlp.linear_fc1.bias", "ffn_up.bias"),
    ("mlp.down_proj.weight", "mlp.linear_fc2.weight", "ffn_down.weight"),
    ("mlp.down_proj.bias", "mlp.linear_fc2.bias", "ffn_down.bias"),
)
# Megatron's local layer spec keeps the norms apart from the linear layers that follow them.
_MEGATRON_UNFUSED = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "input_layernorm.bias": "self_attention.linear_qkv.layer_norm_bias",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.bias": "mlp.linear_fc1.layer_norm_bias",
}

# What only the relatives have, which Megatron's side of this package does not read.
_RELATIVES_PER_LAYER = (
    ("mlp.gate_proj.weight", "ffn_gate.weight"),
    ("mlp.gate_proj.bias", "ffn_gate.bias"),
    ("self_attn.q_norm.weight", "attn_q_norm.weight"),
    ("self_attn.k_norm.weight", "attn_k_norm.weight"),
)

_HF_LAYER = re.compile(r"model\.layers\.(\d{1,5})\.(.+)")
_MEGATRON_LAYER = re.compile(r"decoder\.layers\.(\d{1,5})\.(.+)")
_GGUF_LAYER = re.compile(r"blk\.(\d{1,5})\.(.+)")

_HF_TO_MEGATRON = {hf: megatron for hf, megatron, _ in _GLOBAL + _PER_LAYER}
_MEGATRON_TO_HF = {megatron: hf for hf, megatron, _ in _GLOBAL + _PER_LAYER}
_HF_TO_GGUF = {hf: gguf for hf, _, gguf in _GLOBAL + _PER_LAYER} | dict(_RELATIVES_PER_LAYER)
_GGUF_TO_HF = {gguf: hf for hf, gguf in _HF_TO_GGUF.items()}


def hf_to_megatron(name: str) -> tuple[str, str | None]:
    """Megatron's name (no prefix, layer number included) and, for q, k and v, which part of the fused matrix.

    Raises:
        CheckpointError: not a parameter of a Nemotron causal language model.
    """
    found = _through(name, _HF_LAYER, _HF_TO_MEGATRON, "decoder.layers.{}.{}")
    base, _, part = found.partition("+")
    return base, part or None


def megatron_to_hf(name: str, part: str | None = None) -> str:
    """The inverse of `hf_to_megatron`; separate norm names of the local layer spec are read too."""
    match = _MEGATRON_LAYER.fullmatch(name)
    if match and match[2] in _MEGATRON_UNFUSED:
        name = f"decoder.layers.{match[1]}.{_MEGATRON_UNFUSED[match[2]]}"
    return _through(name if part is None else f"{name}+{part}", _MEGATRON_LAYER, _MEGATRON_TO_HF, "model.layers.{}.{}")


def is_fused_qkv(name: str) -> bool:
    """Whether a Megatron name is a fused matrix (or bias) of queries, keys and values."""
    return name.endswith(("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"))


def hf_to_gguf(name: str) -> str:
    """llama.cpp's name of a parameter.

    Raises:
        CheckpointError: not a parameter of a Nemotron causal language model.
    """
    return _through(name, _HF_LAYER, _HF_TO_GGUF, "blk.{}.{}")


def gguf_to_hf(name: str) -> str:
    """The inverse of `hf_to_gguf`."""
    return _through(name, _GGUF_LAYER, _GGUF_TO_HF, "model.layers.{}.{}")


def _through(name: str, pattern: re.Pattern[str], table: dict[str, str], template: str) -> str:
    match = pattern.fullmatch(name)
    # `str(int())`: layer 01 is not layer 1.
    if match and match[2] in table and match[1] == str(int(match[1])) and match[2] not in _GLOBAL_NAMES:
        return template.format(match[1], table[match[2]])
    if not match and name in table and name in _GLOBAL_NAMES:
        return table[name]
    raise CheckpointError(f"{name}: not the name of a parameter of a Nemotron model")


_GLOBAL_NAMES = {spelling for row in _GLOBAL for spelling in row}


def is_norm_weight(name: str) -> bool:
    """Whether a Hugging Face name is a LayerNorm1P weight, which is stored as gamma - 1."""
    return name.endswith(("layernorm.weight", "model.norm.weight"))


def hf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the causal language model under `config`, in file order, with its shape.

    Without `lm_head.weight` if embeddings are tied.
    """
    return describe(config).tensor_shapes


def qkv_rows(heads: int, groups: int, head_dim: int) -> dict[str, list[tuple[int, int]]]:
    """Which rows of Megatron's fused matrix are q, k and v: part -> (start, stop) runs in the order of the heads.

    The fused matrix is (groups, heads / groups + 2, head_dim, hidden): the queries of a group, its key, its value.
    """
    per_group = heads // groups
    stride = (per_group + 2) * head_dim
    runs: dict[str, list[tuple[int, int]]] = {"q": [], "k": [], "v": []}
    for group in range(groups):
        first = group * stride
        key = first + per_group * head_dim
        runs["q"].append((first, key))
        runs["k"].append((key, key + head_dim))
        runs["v"].append((key + head_dim, first + stride))
    return runs
