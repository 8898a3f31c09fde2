"""NeMo's model_config.yaml, model.yaml, io.json and our configuration: which key means what, and what is refused."""

from __future__ import annotations

from typing import Any

from minitron.config import NemotronConfig

from ..hf import config_from
from ..limits import CheckpointError, require, shown
from .files import Call, Reference

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
_NEMO2 = "nemo.collections.llm.gpt.model"
# Arguments of NeMo 2's classes (nemotron.py) that a file may leave out: io.json has only those that were passed.
_COMMON = {
    "normalization": "LayerNorm",
    "layernorm_zero_centered_gamma": True,
    "rotary_percent": 0.5,
    "share_embeddings_and_output_weights": False,
    "seq_length": 4096,
    "init_method_std": 0.0134,
}


def _class(layers: int, hidden: int, ffn: int, heads: int, groups: int | None, **others: Any) -> dict[str, Any]:
    shape = {"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": heads}
    return {**_COMMON, **shape, "num_query_groups": groups, "kv_channels": None, **others}


_CLASSES = {
    "NemotronConfig": _class(32, 3072, 9216, 24, 8, kv_channels=128),
    "Nemotron3Config4B": _class(32, 3072, 9216, 24, 8, kv_channels=128),
    "Nemotron3Config8B": _class(32, 4096, 16384, 32, None, init_method_std=0.010),
    "Nemotron3Config22B": _class(40, 6144, 24576, 48, None, init_method_std=0.008),
    "Nemotron4Config15B": _class(32, 6144, 24576, 48, 8),
    "Nemotron4Config340B": _class(96, 18432, 73728, 96, 8, init_method_std=0.0063),
}
_FLAGS = ("gated_linear_unit", "layernorm_zero_centered_gamma", "scale_positional_embedding", "rope_scaling")
_GATED = ("fast-swiglu", "swiglu", "fast-geglu", "geglu", "fast-reglu", "reglu")


def config_from_nemo(values: dict[str, Any], vocab_size: int, where: object) -> NemotronConfig:
    """The configuration that a NeMo YAML describes. Biases and dtype are seen in the tensors, not here.

    Raises:
        CheckpointError: something that a Nemotron model does not have (gated MLP, RMSNorm, learned positions), or
            values that cannot be.
    """
    for key in _FLAGS:
        flag = values.get(key)
        require(flag is None or isinstance(flag, bool), f"{where}: {key} is {shown(flag)}, expected true or false")
    _check_architecture(values, where)
    found: dict[str, Any] = {"vocab_size": vocab_size, "architectures": ["NemotronForCausalLM"]}
    for theirs, ours in _KEYS.items():
        if values.get(theirs) is not None:
            found[ours] = values[theirs]
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        require(key in found, f"{where}: no {key.replace('hidden_layers', 'layers')}; expected a NeMo model config")
    if found.get("intermediate_size") is None:
        hidden = found["hidden_size"]
        require(type(hidden) is int, f"{where}: hidden_size is {shown(hidden)}, expected a whole number")
        found["intermediate_size"] = 4 * hidden  # Megatron's default
    # Megatron's own defaults, which are not those of the Hugging Face config.
    found["partial_rotary_factor"] = values.get("rotary_percentage", values.get("rotary_percent", 1.0))
    found.setdefault("rope_theta", 10000.0)
    length = values.get("max_position_embeddings") or values.get("seq_length") or values.get("encoder_seq_length")
    if length is not None:
        found["max_position_embeddings"] = length
    scaling = _scaling_from_nemo(values, where)
    if scaling:
        rope = {key: found[key] for key in ("rope_theta", "partial_rotary_factor")}
        found["rope_parameters"] = {**rope, **scaling}
    found["hidden_act"] = _activation(values, where)
    return config_from({"model_type": "nemotron", **found}, where)


def with_class_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """`values` of a model's config, with what NeMo 2's class of that name fills in."""
    return {**_CLASSES.get(str(values.get("_target_")).rpartition(".")[2], {}), **values}


def _scaling_from_nemo(values: dict[str, Any], where: object) -> dict[str, Any] | None:
    """RoPE scaling: linear by one factor, or Llama 3.1's by the keys of NeMo 1, of NeMo 2's class, or of Megatron."""
    linear = values.get("seq_len_interpolation_factor")
    llama = str(values.get("_target_")).rpartition(".")[2].startswith(("Llama31", "Llama32", "Llama33"))
    llama = llama or bool(values.get("scale_positional_embedding") or values.get("rope_scaling"))
    numbers = {"seq_len_interpolation_factor": linear}
    if llama:
        factor = values.get("scale_factor", values.get("rope_scaling_factor", 8.0))
        numbers |= {"scale_factor": factor, "low_freq_factor": values.get("low_freq_factor", 1.0)}
        numbers |= {"high_freq_factor": values.get("high_freq_factor", 4.0)}
        numbers |= {"old_context_len": values.get("old_context_len", 8192)}
    for key, value in numbers.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e300
        absent = value is None and key == "seq_len_interpolation_factor"
        require(absent or number, f"{where}: {key} is {shown(value)}, expected a number above 0")
    has_linear = linear not in (None, 1, 1.0)
    require(not (llama and has_linear), f"{where}: both linear and Llama 3.1 RoPE scaling; expected one of them")
    if has_linear:
        return {"rope_type": "linear", "factor": float(linear)}  # type: ignore[arg-type]
    if not llama:
        return None
    return {
        "rope_type": "llama3",
        "factor": float(numbers["scale_factor"]),  # type: ignore[arg-type]
        "low_freq_factor": float(numbers["low_freq_factor"]),  # type: ignore[arg-type]
        "high_freq_factor": float(numbers["high_freq_factor"]),  # type: ignore[arg-type]
        "original_max_position_embeddings": int(numbers["old_context_len"]),  # type: ignore[arg-type]
    }


def _check_architecture(values: dict[str, Any], where: object) -> None:
    position = values.get("position_embedding_type", "rope")
    require(position == "rope", f"{where}: position_embedding_type is {shown(position)}, expected 'rope'")
    norm = str(values.get("normalization", "layernorm1p")).lower()
    require(norm in ("layernorm1p", "layernorm"), f"{where}: normalization is {shown(norm)}, expected 'layernorm1p'")
    require(not values.get("gated_linear_unit"), f"{where}: gated_linear_unit is set; a Nemotron MLP has no gate")
    experts = values.get("num_moe_experts")
    require(experts in (None, 0, 1), f"{where}: num_moe_experts is {shown(experts)}; a Nemotron model has no experts")
    kind = values.get("transformer_block_type", "pre_ln")
    require(kind == "pre_ln", f"{where}: transformer_block_type is {shown(kind)}, expected 'pre_ln'")


def _activation(values: dict[str, Any], where: object) -> str:
    name = values.get("activation", values.get("activation_func", "squared-relu"))
    if isinstance(name, dict):  # NeMo 2 writes functions as {_target_: dotted name, _call_: false}
        name = name.get("_target_")
    require(name not in _GATED, f"{where}: activation is {shown(name)}, a gated one; a Nemotron MLP has no gate")
    short = str(name).rpartition(".")[2].replace("_", "-")
    require(short in _ACTIVATIONS, f"{where}: activation is {shown(name)}, expected one of {', '.join(_ACTIVATIONS)}")
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
        **_nemo1_scaling(config),
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


def nemo2_model(config: NemotronConfig, dtype: str, divisible_by: int, vocab_size: int, tokenizer: str | None) -> Call:
    """The call that builds NeMo 2's model.

    Args:
        config: the model's.
        dtype: "bfloat16", "float16" or "float32".
        divisible_by: of which number the rows of the embedding are a multiple.
        vocab_size: those rows; NeMo pads no further where it is told.
        tokenizer: a folder in `context/` for Hugging Face's tokenizer, a `.model` for SentencePiece, or None.

    Raises:
        CheckpointError: what NeMo has no argument for (an activation, a RoPE type).
    """
    scaling = _llama3(config)
    arguments = {
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
        "activation_func": Reference(_nemo2_activation(config)),
        "gated_linear_unit": False,
        "bias_activation_fusion": False,
        "add_bias_linear": bool(config.attention_bias or config.mlp_bias),
        "position_embedding_type": "rope",
        "rotary_percent": config.partial_rotary_factor,
        "rotary_base": config.rope_theta,
        "seq_len_interpolation_factor": _linear(config),
        **scaling,
        "share_embeddings_and_output_weights": bool(config.tie_word_embeddings),
        "make_vocab_size_divisible_by": divisible_by,
        "vocab_size": vocab_size,
        "params_dtype": Reference(f"torch.{dtype}"),
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
    }
    # Llama 3.1's config is the one class of NeMo that scales RoPE so; every argument in which it differs is given.
    name = f"{_NEMO2}.llama.Llama31Config" if scaling else f"{_NEMO2}.nemotron.NemotronConfig"
    return Call(
        f"{_NEMO2}.nemotron.NemotronModel", {"config": Call(name, arguments), "tokenizer": _tokenizer(tokenizer)}
    )


def _tokenizer(place: str | None) -> Call | None:
    if place is None:
        return None
    if place.endswith(".model"):
        name = "nemo.collections.common.tokenizers.sentencepiece_tokenizer.SentencePieceTokenizer"
        return Call(name, {"model_path": place})
    name = "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer"
    return Call(name, {"pretrained_model_name": place})


def yaml_values(value: Any) -> Any:
    """A call as NeMo 2's `model.yaml` spells it."""
    if isinstance(value, Call):
        return {"_target_": value.name, **{key: yaml_values(item) for key, item in value.arguments.items()}}
    return {"_target_": value.name, "_call_": False} if isinstance(value, Reference) else value


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
    return (
        "nemo.collections.llm.fn.activation.squared_relu" if name == "squared-relu" else f"torch.nn.functional.{name}"
    )


def _nemo1_scaling(config: NemotronConfig) -> dict[str, Any]:
    scaling = _llama3(config)
    return {"seq_len_interpolation_factor": _linear(config), "scale_positional_embedding": bool(scaling), **scaling}


def _linear(config: NemotronConfig) -> float | None:
    """The factor of linear RoPE scaling.

    Raises:
        CheckpointError: a RoPE type that NeMo cannot express.
    """
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    known = kind in ("default", "linear", "llama3")
    require(known, f"rope_type is {kind!r}; NeMo scales RoPE in two ways only, linear and llama3")
    return float(rope["factor"]) if kind == "linear" else None


def _llama3(config: NemotronConfig) -> dict[str, Any]:
    """Llama 3.1's RoPE scaling under NeMo's names; {} where there is none."""
    rope = config.rope_parameters or {}
    if rope.get("rope_type") != "llama3":
        return {}
    original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
    return {
        "scale_factor": rope["factor"],
        "low_freq_factor": rope["low_freq_factor"],
        "high_freq_factor": rope["high_freq_factor"],
        "old_context_len": original,
    }
