"""The JSON files of a checkpoint, without the classes of transformers that give them meaning.

Only files are accepted of which every key and value is known to mean the same to those classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.limits import MAX_CONFIG_BYTES, MAX_LAYERS, CheckpointError, read_json


class NotServedError(Exception):
    """The ordinary path must serve this request; the message says why."""


def refuse_unless(condition: object, reason: str) -> None:
    """Raise `NotServedError(reason)` unless `condition` holds."""
    if not condition:
        raise NotServedError(reason)


@dataclass(frozen=True)
class PlainConfig:
    """What is read of a config.json; the names are those of `NemotronConfig`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: str
    model_type = "nemotron"
    hidden_act = "relu2"

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """What `minitron.shapes` asks for."""
        theta, share = self.rope_theta, self.partial_rotary_factor
        return {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": share}

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that rotate."""
        return int(self.head_dim * self.partial_rotary_factor)


def _whole(most: int, least: int = 1) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and math.isfinite(value) and low < value <= high


def _is(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: any(value is x or (type(value) is type(x) and value == x) for x in allowed)


_ID = _whole((1 << 31) - 1, least=0)


def _ids(value: Any) -> bool:
    return _ID(value) or (isinstance(value, list) and 0 < len(value) <= 64 and all(map(_ID, value)))


def _text(value: Any) -> bool:
    return isinstance(value, str)


_ANYTHING_SMALL = _number(-1.0, 1e6)
_NEEDED: dict[str, Callable[[Any], bool]] = {
    "vocab_size": _whole(1 << 22),
    "hidden_size": _whole(1 << 20),
    "intermediate_size": _whole(1 << 24),
    "num_hidden_layers": _whole(MAX_LAYERS),
    "num_attention_heads": _whole(1 << 16),
    "num_key_value_heads": _whole(1 << 16),
    "head_dim": _whole(1 << 16),
    "max_position_embeddings": _whole(1 << 24),
    "norm_eps": _number(0.0, 1.0),
    "tie_word_embeddings": _is(True, False),
    "attention_bias": _is(True, False),
    "mlp_bias": _is(True, False),
    "dtype": _is("bfloat16", "float32"),
}
"""Keys that config.json must have; `rope_parameters`, too, which has the rest of a `PlainConfig`."""
_BESIDE: dict[str, Callable[[Any], bool]] = {
    "architectures": _is(["NemotronForCausalLM"]),
    "model_type": _is("nemotron"),
    "hidden_act": _is("relu2"),
    "attention_dropout": _is(0.0, 0),
    "initializer_range": _ANYTHING_SMALL,
    "use_cache": _is(True),
    "bos_token_id": _ID,
    "eos_token_id": _ids,
    "pad_token_id": lambda value: value is None or _ID(value),
    "torch_dtype": _text,
    "rope_theta": _number(0.0, 1e9),
    "partial_rotary_factor": _number(0.0, 1.0),
    "rope_parameters": lambda value: isinstance(value, dict),
    "transformers_version": _text,
}
"""Keys that it may have, with the values that change nothing."""


def read_plain_config(folder: Path) -> PlainConfig:
    """The configuration of a folder's model.

    Raises:
        NotServedError: the file is missing or wrong, or not of the plain kind.
    """
    values = _read(folder / "config.json", {**_NEEDED, **_BESIDE})
    missing = [name for name in (*_NEEDED, "model_type", "hidden_act", "architectures") if name not in values]
    refuse_unless(not missing, f"config.json has no {missing[:1]}")
    rope = values.get("rope_parameters") or {}
    refuse_unless(set(rope) == {"rope_type", "rope_theta", "partial_rotary_factor"}, "rope_parameters of another kind")
    refuse_unless(rope["rope_type"] == "default", "a scaled rotation")
    for name in ("rope_theta", "partial_rotary_factor"):
        refuse_unless(_BESIDE[name](rope[name]) and values.get(name, rope[name]) == rope[name], f"two values of {name}")
    refuse_unless(values.get("torch_dtype", values["dtype"]) == values["dtype"], "two dtypes")
    pad = values.get("pad_token_id")
    refuse_unless(pad is None or pad < values["vocab_size"], "a pad_token_id outside the vocabulary")
    found = {name: values[name] for name in _NEEDED}
    config = PlainConfig(**found, rope_theta=rope["rope_theta"], partial_rotary_factor=rope["partial_rotary_factor"])
    refuse_unless(config.num_attention_heads % config.num_key_value_heads == 0, "groups of several sizes")
    refuse_unless(config.rotary_dim % 2 == 0 and config.rotary_dim > 0, "an odd number of rotated channels")
    return config


_GENERATION: dict[str, Callable[[Any], bool]] = {
    "bos_token_id": _ID,
    "eos_token_id": _ids,
    "pad_token_id": _ID,
    "do_sample": _is(True),
    "temperature": lambda value: _number(0.0, 1e6)(value) and value != 1,
    "top_p": lambda value: _number(0.0, 1.0)(value) and value != 1,
    "top_k": lambda value: _whole(1 << 31)(value) and value != 50,
    "min_p": _number(0.0, 1.0),
    "repetition_penalty": lambda value: _number(0.001, 1000.0)(value) and value != 1,
    "max_new_tokens": _whole(1 << 31),
    "transformers_version": _text,
    "_from_model_config": _is(True, False),
    "output_attentions": _is(False),
    "output_hidden_states": _is(False),
    "use_cache": _is(True),
}
"""Values that are the defaults of some release of transformers are refused: there the key does not count as stated."""


class Recommended:
    """A generation_config.json, in the place of transformers' `GenerationConfig` for `SamplingParameters.for_model`."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        ends = values["eos_token_id"]
        self.ends: tuple[int, ...] = tuple(ends) if isinstance(ends, list) else (ends,)
        """Tokens that end a text."""

    def to_diff_dict(self) -> dict[str, Any]:
        """The values that the file states."""
        return self._values


def read_recommended(folder: Path) -> Recommended:
    """A folder's generation_config.json.

    Raises:
        NotServedError: the file is missing or wrong, asks for more than parameters, or names no end of a text.
    """
    values = _read(folder / "generation_config.json", _GENERATION)
    refuse_unless("eos_token_id" in values, "no eos_token_id in generation_config.json")
    return Recommended(values)


def _read(path: Path, known: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    try:
        values = read_json(path, MAX_CONFIG_BYTES)
    except CheckpointError as error:
        raise NotServedError(str(error)) from None
    for name, value in values.items():
        refuse_unless(name in known and known[name](value), f"{path.name} has {name}")
    return values
