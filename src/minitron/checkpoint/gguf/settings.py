"""A configuration as the keys of a GGUF file, and back, for each architecture of `families`.

Source: llama.cpp's llama-arch.cpp (keys) and convert_hf_to_gguf.py (what stands in them).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Mapping
from typing import Any

import numpy as np

from minitron.families import FAMILIES, Family, family_of
from minitron.shapes import Shape, describe

from ..limits import CheckpointError, parse_json, require, shown

TIED_KEY = "nemotron.tie_word_embeddings"
"""Our own key: llama.cpp wants `output.weight` in every Nemotron file, so tied weights are written twice."""
MODEL_TYPE_KEY = "minitron.model_type"
"""Our own key, where several families share an architecture of llama.cpp: Mistral's files are those of a Llama."""
ROPE_KEY = "minitron.rope_parameters"
"""Our own key, JSON: the numbers behind `rope_freqs.weight`, which llama.cpp keeps as factors only."""
ARCHITECTURES = tuple(dict.fromkeys(family.gguf for family in FAMILIES.values()))
ACTIVATIONS = {"nemotron": ("relu2", "the squared ReLU")}
_SILU = ("silu", "SiLU")
_SCALINGS = {"nemotron": ("linear", "yarn")}
"""Types of RoPE scaling of llama.cpp's graphs. Nemotron's passes no factors per frequency to its RoPE, and its files
with such a tensor are refused; dynamic and longrope depend on the length of the text."""
_OTHER_SCALINGS = ("linear", "yarn", "llama3")
_YARN_BETAS = {"beta_fast": 32, "beta_slow": 1}
_WHOLE = (
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("embedding_length", "block_count", "feed_forward_length", "context_length", "rope.dimension_count"),
    *("rope.scaling.original_context_length", "expert_count", "attention.sliding_window"),
)
_REAL = (
    *("attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor"),
    *("rope.scaling.attn_factor", "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
)


def family_in(keys: Mapping[str, Any], where: object) -> Family:
    """The family of a file.

    Raises:
        CheckpointError: an architecture that is not in the table; experts.
    """
    arch = keys.get("general.architecture")
    expected = ", ".join(map(repr, ARCHITECTURES))
    require(arch in ARCHITECTURES, f"{where}: general.architecture is {shown(arch)}, expected one of {expected}")
    candidates = [family for family in FAMILIES.values() if family.gguf == arch]
    named = keys.get(MODEL_TYPE_KEY)
    return next((family for family in candidates if family.model_type == named), candidates[0])


def config_values(
    keys: Mapping[str, Any], family: Family, vocabulary: int, names: Container[str], factors: Any, where: object
) -> dict[str, Any]:
    """The values of `config.json` that a file's keys give.

    Args:
        keys: of the header.
        family: of the file.
        vocabulary: rows of the embedding.
        names: Hugging Face names of its tensors.
        factors: numbers of `rope_freqs.weight`, None if it is missing or all ones.
        where: the file, for messages.

    Raises:
        CheckpointError: a value of the wrong kind, or one that the family's classes cannot compute with.
    """
    _check_keys(keys, family.gguf, where)

    def get(name: str, default: Any = None) -> Any:
        return keys.get(f"{family.gguf}.{name}", default)

    heads, hidden = get("attention.head_count"), get("embedding_length")
    both = {"attention.head_count": heads, "embedding_length": hidden}
    _require_sizes(both, family.gguf, where)
    head_dim = get("attention.key_length", hidden // heads)
    rotary = get("rope.dimension_count", head_dim)
    both = {"attention.key_length": head_dim, "rope.dimension_count": rotary}
    _require_sizes(both, family.gguf, where)
    _check_kind(get, family, head_dim, rotary, where)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": get("rope.freq_base", 10000.0)}
    if family.rotary_share is None:
        rope["partial_rotary_factor"] = rotary / head_dim
    rope |= _rope_scaling(get, where)
    if factors is not None:
        rope |= llama3_of(np.asarray(factors, np.float64), rope["rope_theta"], head_dim, keys.get(ROPE_KEY), where)
    values = {
        "model_type": family.model_type,
        "architectures": [family.architecture],
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": get("context_length", 4096),
        family.norm.eps: round(get(_epsilon(family), 1e-5), 12),
        "rope_parameters": rope,
        "tie_word_embeddings": "lm_head.weight" not in names or bool(keys.get(TIED_KEY)),
    }
    if family.windowed:
        values["sliding_window"] = None
    for part in family.layer:
        if isinstance(part.bias, str):
            bias = f"model.layers.0.{part.name}.bias" in names
            values[part.bias] = values.get(part.bias, False) or bias
    for name in ("bos", "eos", "pad"):
        number = keys.get({"pad": "tokenizer.ggml.padding_token_id"}.get(name, f"tokenizer.ggml.{name}_token_id"))
        if type(number) is int:
            values[f"{name}_token_id"] = number
    return values


def _epsilon(family: Family) -> str:
    return {"layernorm1p": "attention.layer_norm_epsilon", "rmsnorm": "attention.layer_norm_rms_epsilon"}[
        family.norm.kind
    ]


def _require_sizes(sizes: Mapping[str, Any], arch: str, where: object) -> None:
    good = all(type(value) is int and 0 < value < 1 << 31 for value in sizes.values())
    told = ", ".join(f"{arch}.{name} {shown(value)}" for name, value in sizes.items())
    require(good, f"{where}: {told}; expected sizes above 0")


def _check_kind(get: Callable[..., Any], family: Family, head_dim: int, rotary: int, where: object) -> None:
    """Refuse what the architecture's name covers and its classes in transformers do not compute."""
    experts, window, values = get("expert_count"), get("attention.sliding_window"), get("attention.value_length")
    dense = f"{where}: {family.gguf}.expert_count is {experts}; a mixture of experts, expected a dense model"
    require(not experts, dense)
    context = get("context_length", 4096)
    reach = (
        f"{where}: {family.gguf}.attention.sliding_window is {window}, shorter than the context ({context}); minitron "
        f"works with models that attend to the whole context"
    )
    require(not window or window >= context, reach)
    even = f"{where}: {family.gguf}.attention.value_length is {values}, expected key_length ({head_dim})"
    require(values in (None, head_dim), even)
    turned = f"{where}: {family.gguf}.rope.dimension_count is {rotary}, expected that of a whole head ({head_dim})"
    require(family.rotary_share is None or rotary == head_dim, turned)


def _check_keys(keys: Mapping[str, Any], arch: str, where: object) -> None:
    """Numbers must be numbers: a file may give any key any type."""
    for names, kinds, expected in ((_WHOLE, (int,), "a whole number"), (_REAL, (int, float), "a number")):
        for name in names:
            value = keys.get(f"{arch}.{name}")
            good = value is None or (type(value) in kinds and math.isfinite(value))
            require(good, f"{where}: {arch}.{name} is {shown(value)}, expected {expected}")
    tied = keys.get(TIED_KEY)
    require(tied is None or type(tied) is bool, f"{where}: {TIED_KEY} is {shown(tied)}, expected true or false")


# --- rotary embedding --------------------------------------------------------------------------------------------


def _rope_scaling(get: Callable[..., Any], where: object) -> dict[str, Any]:
    kind = get("rope.scaling.type", "none")
    if kind == "none":
        return {}
    require(kind in ("linear", "yarn"), f"{where}: rope.scaling.type is {shown(kind)}, expected linear or yarn")
    factor = get("rope.scaling.factor", 1.0)
    good = isinstance(factor, int | float) and not isinstance(factor, bool) and 0 < factor < math.inf
    require(good, f"{where}: rope.scaling.factor is {shown(factor)}, expected a number above 0")
    rope: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "linear":
        return rope
    names = {"original_max_position_embeddings": "original_context_length", "beta_fast": "yarn_beta_fast",
             "beta_slow": "yarn_beta_slow"}  # fmt: skip
    rope |= {ours: value for ours, name in names.items() if (value := get(f"rope.scaling.{name}")) is not None}
    attention = get("rope.scaling.attn_factor", 1.0)
    require(isinstance(attention, float), f"{where}: rope.scaling.attn_factor is {shown(attention)}, expected a number")
    if attention != 1.0:
        # float32 in the file: more digits would be noise.
        rope["attention_factor"] = round(attention * yarn_default_attention(factor), 7)
    return rope


def yarn_default_attention(factor: float, scale: float = 1.0) -> float:
    """By how much yarn multiplies cosines and sines for a context `factor` times as long (paper, eq. 22)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """By what llama3's scaling divides the frequency of each pair of channels: (head_dim / 2,) float64."""
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    original = rope["original_max_position_embeddings"]
    lengths = 2 * np.pi * float(rope["rope_theta"]) ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (original / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(lengths < original / high, 1.0, np.where(lengths > original / low, factor, between))


def llama3_of(factors: np.ndarray, theta: float, head_dim: int, kept: Any, where: object) -> dict[str, Any]:
    """The llama3 scaling behind the factors of a file: as this package wrote it, or one of Meta's.

    Raises:
        CheckpointError: they are those of neither.
    """
    candidates = []
    if isinstance(kept, str):
        values = parse_json(kept.encode(), f"{where}: {ROPE_KEY}")
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if all(type(values.get(name)) in (int, float) and values[name] > 0 for name in names):
            candidates.append({name: values[name] for name in names})
    candidates += [
        {"factor": float(np.round(factors.max(), 4)), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 1 << power}
        for power in (13, 12, 11, 14, 15, 16)
    ]  # fmt: skip
    for rope in candidates:
        if rope["low_freq_factor"] < rope["high_freq_factor"] and factors.shape == (head_dim // 2,):
            expected = llama3_factors({**rope, "rope_theta": theta}, head_dim)
            if np.allclose(factors, expected, rtol=1e-4, atol=0):
                return {"rope_type": "llama3", **rope}
    raise CheckpointError(
        f"{where}: rope_freqs.weight (RoPE factors per frequency) is not that of a llama3 scaling known here; convert "
        f"the Hugging Face checkpoint instead, whose config.json says which it is"
    )


def add_keys(writer: Any, config: Any, quantization: str, name: str, gguf: Any) -> None:
    """The architecture's keys, as llama.cpp reads them.

    Raises:
        CheckpointError: what llama.cpp's graph for this architecture has no key for.
    """
    family, shape = family_of(config), describe(config)
    usual, meaning = ACTIVATIONS.get(family.gguf, _SILU)
    act = shape.activation
    require(act == usual, f"hidden_act is {act!r}; llama.cpp's {family.title} computes {meaning} only")
    writer.add_name(name)
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.max_positions)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.groups)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    add_epsilon = writer.add_layer_norm_rms_eps if family.norm.kind == "rmsnorm" else writer.add_layer_norm_eps
    add_epsilon(shape.norm_eps)
    writer.add_rope_freq_base(shape.rope_theta)
    # Of head_dim, not of hidden_size / heads, which is another number for Minitron-8B.
    writer.add_rope_dimension_count(shape.rotary_dim)
    _add_rope_scaling(writer, shape, gguf)
    if family.gguf == "nemotron":
        writer.add_bool(TIED_KEY, shape.tied)
    if family.gguf != family.model_type:
        writer.add_string(MODEL_TYPE_KEY, family.model_type)
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[quantization]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_rope_scaling(writer: Any, shape: Shape, gguf: Any) -> None:
    rope = shape.rope
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return
    known = _SCALINGS.get(shape.family.gguf, _OTHER_SCALINGS)
    number = {2: "two", 3: "three"}[len(known)]
    ways = f"{', '.join(known[:-1])} and {known[-1]}"
    told = f"llama.cpp's {shape.family.title} scales RoPE in {number} ways only, {ways}"
    require(kind in known, f"rope_type is {kind!r}; {told}")
    if kind == "llama3":
        writer.add_string(ROPE_KEY, json.dumps({key: value for key, value in rope.items() if value is not None}))
        return
    factor = float(rope["factor"])
    writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
    writer.add_rope_scaling_factor(factor)
    if kind == "linear":
        return
    require(rope.get("truncate", True), "rope_parameters has truncate: false; llama.cpp's yarn always truncates")
    original = rope.get("original_max_position_embeddings") or shape.max_positions
    writer.add_rope_scaling_orig_ctx_len(int(original))
    writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or _YARN_BETAS["beta_fast"]))
    writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or _YARN_BETAS["beta_slow"]))
    attention = _yarn_attention(rope, factor)
    if attention is not None:
        writer.add_rope_scaling_attn_factors(attention / yarn_default_attention(factor))


def _yarn_attention(rope: Mapping[str, Any], factor: float) -> float | None:
    """What cosines and sines are multiplied with, where it is not yarn's own value."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return yarn_default_attention(factor, rope["mscale"]) / yarn_default_attention(factor, rope["mscale_all_dim"])
    return None


def yarn_options(config: Any) -> str:
    """Command-line options with which llama.cpp computes the same yarn; empty where it needs none."""
    rope = config.rope_parameters or {}
    betas = [(key, rope[key]) for key, usual in _YARN_BETAS.items() if rope.get(key, usual) not in (usual, None)]
    if rope.get("rope_type") != "yarn":
        return ""
    return " ".join(f"--yarn-{key.replace('_', '-')} {value}" for key, value in betas)
