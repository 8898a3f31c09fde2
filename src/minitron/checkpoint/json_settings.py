"""Check the JSON files of a checkpoint before anything acts on them: types, sizes, and harmful keys.

transformers puts every key of these files on an object as an attribute, builds a map of `num_labels` entries, loads
another file than the usual one where `transformers_weights` says so, and fetches a kernel where `attn_implementation`
names a repository. Whatever is refused here is refused with a clear error, before transformers sees it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .limits import (
    MAX_CONFIG_BYTES,
    MAX_DIMENSION,
    MAX_JSON_BYTES,
    MAX_LABELS,
    MAX_LAYERS,
    MAX_TOKENIZER_BYTES,
    MAX_TOKENIZER_JSON_MEMORY,
    CheckpointError,
    json_memory,
    read_json,
    read_small_file,
    require,
    shown,
)

_FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
_MAX_LIST = 10_000
_MAX_ID = 1 << 31
# Upper limits of the integers in config.json. Sizes are compared with the weights afterwards.
_MOST = {
    "num_hidden_layers": MAX_LAYERS,
    "num_labels": MAX_LABELS,
    "vocab_size": 1 << 22,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 24,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "kv_channels": 1 << 16,
    **dict.fromkeys(("max_position_embeddings", "sliding_window", "max_window_layers"), MAX_DIMENSION),
}
_FLAGS = (
    *("use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias", "output_attentions", "output_hidden_states"),
    "use_sliding_window",
)
_NUMBERS = (
    *("initializer_range", "norm_eps", "layer_norm_eps", "layernorm_epsilon", "rms_norm_eps", "attention_dropout"),
    *("rope_theta", "rotary_base", "partial_rotary_factor", "rope_percent", "rope_percentage", "rotary_percentage"),
)
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id")

_COUNTS_OF_GENERATION = (
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "top_k", "no_repeat_ngram_size"),
    *("num_return_sequences", "encoder_no_repeat_ngram_size", "num_beam_groups", "max_cache_len"),
    *("num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size", "prefill_chunk_size"),
)
_NUMBERS_OF_GENERATION = (
    *("temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty"),
    *("encoder_repetition_penalty", "length_penalty", "guidance_scale", "max_time", "penalty_alpha"),
    *("diversity_penalty", "assistant_confidence_threshold"),
)
_FLAGS_OF_GENERATION = (
    *("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "token_healing", "output_attentions"),
    *("output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "low_memory"),
)
_LISTS_OF_GENERATION = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "constraints")

Check = tuple[Callable[[Any], bool], str]


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _is_count(most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value < _MAX_ID


def _is_id_or_ids(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and len(value) <= _MAX_LIST and all(map(_is_id, value)))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_short_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_LIST


_FLAG: Check = (_is_flag, "true or false")
_NUMBER: Check = (_is_number, "a finite number")
_ID: Check = (_is_id_or_ids, "a token id, or a list of them")
_TEXT: Check = (_is_text, "a text")


def _labels(value: Any) -> bool:
    return isinstance(value, dict) and len(value) <= MAX_LABELS


def _names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 16 and all(isinstance(name, str) for name in value)


def _pruned(value: Any) -> bool:
    layers = isinstance(value, dict) and len(value) <= MAX_LAYERS and all(str(key).isdecimal() for key in value)
    return layers and all(_is_short_list(heads) and all(map(_is_id, heads)) for heads in value.values())


def _rope(value: Any) -> bool:
    """A type, numbers, flags; lists of factors for the types that have one for each frequency."""

    def plain(key: str, item: Any) -> bool:
        return _is_text(item) if key in ("rope_type", "type") else item is None or _is_flag(item) or _is_number(item)

    def factors(item: Any) -> bool:
        return isinstance(item, list) and len(item) <= 1 << 16 and all(map(_is_number, item))

    return isinstance(value, dict) and all(plain(key, item) or factors(item) for key, item in value.items())


def _attention(value: Any) -> bool:
    """A name of transformers' own; `owner/name` is a repository that a kernel would be fetched from, and run."""
    return isinstance(value, str) and value.replace("_", "").isalnum()


def _layer_types(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_LAYERS and all(map(_is_text, value))


def _never(_: Any) -> bool:
    return False


_CONFIG: dict[str, Check] = {
    **{name: (_is_count(most), f"a whole number from 0 to {most:,}") for name, most in _MOST.items()},
    **dict.fromkeys(_FLAGS, _FLAG),
    **dict.fromkeys(_NUMBERS, _NUMBER),
    **dict.fromkeys(_IDS, _ID),
    "hidden_act": _TEXT,
    "problem_type": _TEXT,
    "id2label": (_labels, f"a map of at most {MAX_LABELS:,} labels"),
    "label2id": (_labels, f"a map of at most {MAX_LABELS:,} labels"),
    "architectures": (_names, "a list of class names"),
    "pruned_heads": (_pruned, "a map from layer to a list of heads"),
    "rope_parameters": (_rope, "a map of numbers and names"),
    "rope_scaling": (_rope, "a map of numbers and names"),
    "dtype": (lambda value: value in _FLOATS, f"one of {', '.join(_FLOATS)}"),
    "torch_dtype": (lambda value: value in _FLOATS, f"one of {', '.join(_FLOATS)}"),
    "quantization_config": (lambda value: isinstance(value, dict), "a map"),
    "attn_implementation": (_attention, "a name such as sdpa or eager"),
    "_attn_implementation": (_attention, "a name such as sdpa or eager"),
    "experts_implementation": (_attention, "a name"),
    "transformers_weights": (_never, "nothing: the weights are model.safetensors, or the shards of its index"),
    "per_layer_config": (_never, "nothing: all layers of this architecture have one shape"),
    "layer_types": (_layer_types, f"a list of at most {MAX_LAYERS:,} names"),
}
_GENERATION: dict[str, Check] = {
    **{name: (_is_count(1 << 53), "a whole number, 0 or more") for name in _COUNTS_OF_GENERATION},
    **dict.fromkeys(_NUMBERS_OF_GENERATION, _NUMBER),
    **dict.fromkeys(_FLAGS_OF_GENERATION, _FLAG),
    **dict.fromkeys(_IDS, _ID),
    **dict.fromkeys(_LISTS_OF_GENERATION, (_is_short_list, f"a list of at most {_MAX_LIST:,} entries")),
    "early_stopping": (lambda value: _is_flag(value) or value == "never", 'true, false or "never"'),
    "stop_strings": (lambda value: _is_text(value) or (_is_short_list(value) and all(map(_is_text, value))), "texts"),
    "cache_implementation": _TEXT,
    "sequence_bias": (lambda value: _is_short_list(value) or _labels(value), "a list or a map of biases"),
}


def check_config_values(values: dict[str, Any], owner: type, where: object) -> None:
    """Refuse a config.json with values that it must not have, before anything is built from it.

    Args:
        owner: the class of the configuration, on which the keys become attributes.

    Raises:
        CheckpointError: a value of the wrong type or beyond its limit; a key that would replace a method.
    """
    _check(values, _CONFIG, owner, where)


def check_generation_config(folder: Path) -> None:
    """Refuse a `generation_config.json` that transformers would fail on.

    Raises:
        CheckpointError: not JSON; a value of the wrong type or beyond its limit; one that transformers does not take.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return
    from transformers import GenerationConfig

    values = read_json(path, MAX_CONFIG_BYTES)
    _check(values, _GENERATION, GenerationConfig, path)
    try:
        GenerationConfig.from_dict(values)
    except Exception as error:  # transformers validates with errors of many kinds; each means the same here
        raise CheckpointError(f"{path}: {' '.join(str(error).split())}") from None


def _check(values: dict[str, Any], table: dict[str, Check], owner: type, where: object) -> None:
    for key, value in values.items():
        if key not in table and callable(getattr(owner, key, None)):
            raise CheckpointError(f"{where}: the key {shown(key)} is not a setting; it would replace a method")
        if isinstance(value, float) and not math.isfinite(value):
            raise CheckpointError(f"{where}: {key} is {value}, expected a finite number")
        if key in table and value is not None:
            good, expected = table[key]
            require(good(value), f"{where}: {key} is {shown(value)}, expected {expected}")


def check_tokenizer_files(folder: Path) -> None:
    """Refuse tokenizer files that are too expensive to parse, or that are not JSON objects.

    Raises:
        CheckpointError: too large, or not a JSON object.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (folder / name).exists():
            read_json(folder / name, MAX_JSON_BYTES)
    path = folder / "tokenizer.json"
    if path.exists():
        needed = json_memory(read_small_file(path, MAX_TOKENIZER_BYTES))
        most = MAX_TOKENIZER_JSON_MEMORY
        require(needed <= most, f"{path}: its values would take about {needed:,} bytes, expected at most {most:,}")
