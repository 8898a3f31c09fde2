"""NeMo's model_config.yaml / model.yaml and our configuration: which key means what, and what is refused."""

from __future__ import annotations

from typing import Any

from minitron.config import PRESETS, NemotronConfig

from .hf import config_from
from .limits import CheckpointError, require

# NeMo / Megatron spelling -> key here. NeMo 2 uses megatron-core's spellings where there are two.
_KEYS = {
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "init_method_std": "initializer_range",
    "layernorm_epsilon": "norm_eps",
    "attention_dropout": "attention_dropout",
    "rotary_base": "rope_theta",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
}
# Last part of a dotted name (NeMo 2 writes functions so), with dashes.
_ACTIVATIONS = {
    "squared-relu": "relu2",
    "relu": "relu",
    "gelu": "gelu",
    "openai-gelu": "gelu_pytorch_tanh",
    "silu": "silu",
}
# NeMo 2's classes, whose fields may be left out of the YAML where they have the class's values.
_CLASSES = {
    "Nemotron3Config4B": "minitron-4b",
    "Nemotron3Config8B": "nemotron-3-8b",
    "Nemotron4Config15B": "nemotron-4-15b",
    "Nemotron4Config340B": "nemotron-4-340b",
}
_GATED = ("fast-swiglu", "swiglu", "fast-geglu", "geglu", "fast-reglu", "reglu")


def config_from_nemo(values: dict[str, Any], vocab_size: int, where: object) -> NemotronConfig:
    """The configuration that a NeMo YAML describes. Biases and dtype are seen in the tensors, not here.

    Raises:
        CheckpointError: something that a Nemotron model does not have (gated MLP, RMSNorm, learned positions), or
            values that cannot be.
    """
    _check_architecture(values, where)
    found: dict[str, Any] = {"vocab_size": vocab_size, "architectures": ["NemotronForCausalLM"]}
    known = _CLASSES.get(str(values.get("_target_")).rpartition(".")[2])
    if known is not None:
        found |= {"partial_rotary_factor": 0.5, **PRESETS[known]}
    for theirs, ours in _KEYS.items():
        if values.get(theirs) is not None:
            found[ours] = values[theirs]
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        require(key in found, f"{where}: no {key.replace('hidden_layers', 'layers')}; expected a NeMo model config")
    if found.get("intermediate_size") is None:
        found["intermediate_size"] = 4 * found["hidden_size"]  # Megatron's default
    # Megatron's own defaults, which are not those of the Hugging Face config.
    fraction = found.get("partial_rotary_factor", 1.0)
    found["partial_rotary_factor"] = values.get("rotary_percentage", values.get("rotary_percent", fraction))
    found.setdefault("rope_theta", 10000.0)
    length = values.get("max_position_embeddings") or values.get("seq_length") or values.get("encoder_seq_length")
    if length is not None:
        found["max_position_embeddings"] = length
    factor = values.get("seq_len_interpolation_factor")
    require(factor is None or isinstance(factor, int | float), f"{where}: seq_len_interpolation_factor is {factor!r}")
    if factor not in (None, 1, 1.0):
        found["rope_parameters"] = {"rope_type": "linear", "factor": float(factor), "rope_theta": found["rope_theta"]}
        found["rope_parameters"]["partial_rotary_factor"] = found["partial_rotary_factor"]
    found["hidden_act"] = _activation(values, where)
    return config_from({"model_type": "nemotron", **found}, where)


def _check_architecture(values: dict[str, Any], where: object) -> None:
    position = values.get("position_embedding_type", "rope")
    require(position == "rope", f"{where}: position_embedding_type is {position!r}, expected 'rope'")
    norm = str(values.get("normalization", "layernorm1p")).lower()
    require(norm in ("layernorm1p", "layernorm"), f"{where}: normalization is {norm!r}, expected 'layernorm1p'")
    require(not values.get("gated_linear_unit"), f"{where}: gated_linear_unit is set; a Nemotron MLP has no gate")
    experts = values.get("num_moe_experts")
    require(experts in (None, 0, 1), f"{where}: num_moe_experts is {experts!r}; a Nemotron model has no experts")
    kind = values.get("transformer_block_type", "pre_ln")
    require(kind == "pre_ln", f"{where}: transformer_block_type is {kind!r}, expected 'pre_ln'")


def _activation(values: dict[str, Any], where: object) -> str:
    name = values.get("activation", values.get("activation_func", "squared-relu"))
    if isinstance(name, dict):  # NeMo 2 writes functions as {_target_: dotted name, _call_: false}
        name = name.get("_target_")
    require(name not in _GATED, f"{where}: activation is {name!r}, a gated one; a Nemotron MLP has no gate")
    short = str(name).rpartition(".")[2].replace("_", "-")
    require(short in _ACTIVATIONS, f"{where}: activation is {name!r}, expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[short]


def zero_centred_norms(values: dict[str, Any]) -> bool:
    """Whether norm weights are stored as gamma - 1, as LayerNorm1P does."""
    norm = str(values.get("normalization", "layernorm1p")).lower()
    return norm == "layernorm1p" or bool(values.get("layernorm_zero_centered_gamma"))


_PRECISION = {"float32": "32", "float16": "16", "bfloat16": "bf16"}


def nemo1_config(config: NemotronConfig, dtype: str, tokenizer: str | None, divisible_by: int) -> dict[str, Any]:
    """The contents of a NeMo 1 `model_config.yaml`.

    Raises:
        CheckpointError: what NeMo has no key for (an activation, a RoPE type).
    """
    return {
        "mcore_gpt": True,
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "encoder_seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "init_method_std": config.initializer_range,
        "use_scaled_init_method": True,
        "hidden_dropout": 0.0,
        "attention_dropout": config.attention_dropout,
        "ffn_dropout": 0.0,
        "apply_query_key_layer_scaling": False,
        "normalization": "layernorm1p",
        "layernorm_zero_centered_gamma": True,
        "layernorm_epsilon": config.norm_eps,
        "do_layer_norm_weight_decay": False,
        "make_vocab_size_divisible_by": divisible_by,
        "override_vocab_size": config.vocab_size,
        "pre_process": True,
        "post_process": True,
        "persist_layer_norm": True,
        "bias": bool(config.attention_bias or config.mlp_bias),
        "activation": _nemo_activation(config),
        "transformer_block_type": "pre_ln",
        "position_embedding_type": "rope",
        "rotary_percentage": config.partial_rotary_factor,
        "rotary_base": config.rope_theta,
        "seq_len_interpolation_factor": _interpolation(config),
        "attention_type": "multihead",
        "share_embeddings_and_output_weights": bool(config.tie_word_embeddings),
        "precision": _PRECISION.get(dtype, "bf16"),
        "megatron_amp_O2": dtype != "float32",
        "transformer_engine": True,
        "sequence_parallel": False,
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
        "tokenizer": {
            "library": "sentencepiece" if tokenizer else "huggingface",
            "type": None,
            "model": f"nemo:{tokenizer}" if tokenizer else None,
            "vocab_file": None,
            "merge_file": None,
            "delimiter": None,
            "sentencepiece_legacy": False,
        },
    }


def nemo2_config(config: NemotronConfig, dtype: str, divisible_by: int) -> dict[str, Any]:
    """The contents of NeMo 2's `context/model.yaml`, as far as the architecture goes."""
    return {
        "_target_": "nemo.collections.llm.gpt.model.nemotron.NemotronModel",
        "config": {
            "_target_": "nemo.collections.llm.gpt.model.nemotron.NemotronConfig",
            "num_layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_attention_heads": config.num_attention_heads,
            "num_query_groups": config.num_key_value_heads,
            "kv_channels": config.head_dim,
            "seq_length": config.max_position_embeddings,
            "init_method_std": config.initializer_range,
            "attention_dropout": config.attention_dropout,
            "hidden_dropout": 0.0,
            "layernorm_epsilon": config.norm_eps,
            "layernorm_zero_centered_gamma": True,
            "normalization": "LayerNorm",
            "activation_func": {"_call_": False, "_target_": _nemo2_activation(config)},
            "gated_linear_unit": False,
            "add_bias_linear": bool(config.attention_bias or config.mlp_bias),
            "position_embedding_type": "rope",
            "rotary_percent": config.partial_rotary_factor,
            "rotary_base": config.rope_theta,
            "seq_len_interpolation_factor": _interpolation(config),
            "share_embeddings_and_output_weights": bool(config.tie_word_embeddings),
            "make_vocab_size_divisible_by": divisible_by,
            "vocab_size": config.vocab_size,
            "params_dtype": {"_call_": False, "_target_": f"torch.{dtype}"},
            "bf16": dtype == "bfloat16",
            "fp16": dtype == "float16",
        },
    }


def _nemo_activation(config: NemotronConfig) -> str:
    names = {
        "relu2": "squared-relu",
        "relu": "relu",
        "gelu": "gelu",
        "gelu_pytorch_tanh": "openai-gelu",
        "silu": "silu",
    }
    if not isinstance(config.hidden_act, str) or config.hidden_act not in names:
        raise CheckpointError(f"hidden_act is {config.hidden_act!r}; NeMo has names for {', '.join(names)}")
    return names[config.hidden_act]


def _nemo2_activation(config: NemotronConfig) -> str:
    name = _nemo_activation(config)
    return "megatron.core.activations.squared_relu" if name == "squared-relu" else f"torch.nn.functional.{name}"


def _interpolation(config: NemotronConfig) -> float | None:
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    require(kind == "linear", f"rope_type is {kind!r}; NeMo's config has a key for linear scaling only")
    return float(rope["factor"])
