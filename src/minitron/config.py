"""The configuration of a Nemotron model: its keys, the spellings found in checkpoints, presets, and arithmetic.

Names and defaults are those of the transformers page "Nemotron" (v4.46.2). This file uses no tensors.
"""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import transformers
from transformers.configuration_utils import PreTrainedConfig

from .families import Family
from .presets import PRESETS
from .rope_parameters import check_rope
from .shapes import describe

ModelConfig: TypeAlias = Any
"""`NemotronConfig`, or transformers' own configuration of another family of `families`."""

DEFAULT_ROPE_THETA = 10000.0
DEFAULT_PARTIAL_ROTARY_FACTOR = 0.5

# Spellings of older exporters and tools -> the key used here. `kv_channels` and `rotary_*` are NeMo's,
# `rope_percent` stands in nvidia/Minitron-8B-Base, `layer_norm_eps` in exports made outside NVIDIA.
OLD_SPELLINGS = {
    "kv_channels": "head_dim",
    "layer_norm_eps": "norm_eps",
    "layernorm_epsilon": "norm_eps",
    "rope_percent": "partial_rotary_factor",
    "rope_percentage": "partial_rotary_factor",
    "rotary_percentage": "partial_rotary_factor",
    "rotary_base": "rope_theta",
}


class NemotronConfig(PreTrainedConfig):
    """The shape of a Nemotron model. Keys, order and defaults are those of the transformers page.

    Args:
        vocab_size: number of tokens; rows of `embed_tokens` and `lm_head`.
        hidden_size: width of the residual stream.
        intermediate_size: hidden neurons of the MLP.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads.
        head_dim: width of one head; `hidden_size // num_attention_heads` if None. The product of heads and
            head_dim need not be `hidden_size` (Minitron-8B: 48 * 128 != 4096).
        num_key_value_heads: key/value heads (GQA); `num_attention_heads` if None, as the page says.
        hidden_act: a name that transformers knows, or a callable from tensor to tensor.
        max_position_embeddings: context length of the model.
        initializer_range: standard deviation of the truncated normal that initializes weight matrices.
        norm_eps: epsilon of the layer norms.
        use_cache: return keys and values by default.
        pad_token_id, bos_token_id, eos_token_id: special tokens; `eos_token_id` may be a list.
        tie_word_embeddings: `lm_head` shares the weights of `embed_tokens`.
        rope_theta: base of the rotary frequencies.
        partial_rotary_factor: share of each head's channels that rotate, 0 to 1.
        attention_bias: biases on q, k, v, o.
        attention_dropout: dropout on attention probabilities while training.
        mlp_bias: biases on up and down.
        rope_parameters: transformers 5's dictionary (`rope_type`, `rope_theta`, `partial_rotary_factor`, and what
            the type needs). It, `rope_theta`, `partial_rotary_factor` and `rope_scaling` are views of one state.

    Raises:
        ValueError: an impossible shape; it names the field, its value and what would be right.
    """

    model_type = "nemotron"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers' own attribute)
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    # Annotated so that the dataclass machinery of transformers 5 knows the fields; `__init__` below sets them.
    vocab_size: int = 256000
    hidden_size: int = 6144
    intermediate_size: int = 24576
    num_hidden_layers: int = 32
    num_attention_heads: int = 48
    head_dim: int | None = None
    num_key_value_heads: int | None = None
    hidden_act: str | Callable = "relu2"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.0134
    norm_eps: float = 1e-5
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 3
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False

    def __init__(
        self,
        vocab_size: int = 256000,
        hidden_size: int = 6144,
        intermediate_size: int = 24576,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 48,
        head_dim: int | None = None,
        num_key_value_heads: int | None = None,
        hidden_act: str | Callable = "relu2",
        max_position_embeddings: int = 4096,
        initializer_range: float = 0.0134,
        norm_eps: float = 1e-5,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 2,
        eos_token_id: int | list[int] | None = 3,
        tie_word_embeddings: bool = False,
        rope_theta: float = DEFAULT_ROPE_THETA,
        partial_rotary_factor: float = DEFAULT_PARTIAL_ROTARY_FACTOR,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        mlp_bias: bool = False,
        rope_parameters: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        given = dict(locals())
        for old, new in OLD_SPELLINGS.items():
            value = kwargs.pop(old, None)
            if value is not None:
                given[new] = _agreed(old, value, new, given[new], type(self)._default(new))
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.norm_eps = given["norm_eps"]
        self.use_cache = use_cache
        self.pad_token_id = pad_token_id
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.tie_word_embeddings = tie_word_embeddings
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.mlp_bias = mlp_bias

        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = given["head_dim"]
        if self.head_dim is None:
            _require_positive(num_attention_heads=num_attention_heads, hidden_size=hidden_size)
            self.head_dim = hidden_size // num_attention_heads

        scaling = kwargs.pop("rope_scaling", None)
        rope = _require_dict("rope_parameters", rope_parameters) or _require_dict("rope_scaling", scaling)
        rope.setdefault("rope_theta", given["rope_theta"])
        rope.setdefault("partial_rotary_factor", given["partial_rotary_factor"])
        self.rope_parameters = rope
        pruned = kwargs.pop("pruned_heads", None)
        if pruned:  # JSON has strings for keys
            self.pruned_heads = {int(layer): sorted(heads) for layer, heads in pruned.items()}
        wants_attentions = kwargs.pop("output_attentions", None)
        # Before the base class, whose own check of the rotary width raises an error that is not a ValueError.
        self.validate_shapes()
        # The base class fills in the fields of every config.
        try:
            super().__init__(**kwargs)
        except KeyError as error:  # a scaling without the keys it needs
            raise ValueError(f"rope_parameters: {error.args[0]}") from None
        self._output_attentions = bool(wants_attentions)

    @classmethod
    def _default(cls, name: str) -> Any:
        flat = {"rope_theta": DEFAULT_ROPE_THETA, "partial_rotary_factor": DEFAULT_PARTIAL_ROTARY_FACTOR}
        return flat.get(name, getattr(cls, name, None))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> NemotronConfig:
        """The configuration of a published model, e.g. `NemotronConfig.preset("minitron-4b")`; see `PRESETS`."""
        if name not in PRESETS:
            close = difflib.get_close_matches(name.lower(), PRESETS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"preset: no preset {name!r}{hint} Known: {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], "dtype": "bfloat16", **overrides})

    # --- RoPE: one state, four views -------------------------------------------------------------------------

    def __setattr__(self, key: str, value: Any) -> None:
        if key == "rope_parameters":
            value = self._complete_rope(value)
        super().__setattr__(key, value)

    def _complete_rope(self, value: dict[str, Any] | None) -> dict[str, Any]:
        """`value` with the keys that every reader needs; keys that it lacks keep their present values."""
        before = self.__dict__.get("rope_parameters") or {}
        # Null in a file counts as missing; upstream computes with it.
        rope = {name: found for name, found in (value or {}).items() if found is not None or name == "rope_type"}
        rope["rope_type"] = rope.get("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        for key, default in (
            ("rope_theta", DEFAULT_ROPE_THETA),
            ("partial_rotary_factor", DEFAULT_PARTIAL_ROTARY_FACTOR),
        ):
            if rope.get(key) is None:
                rope[key] = before.get(key, default)
        # A fraction always rotates here, so the framework's check of known keys must accept it.
        self.__dict__["ignore_keys_at_rope_validation"] = {"partial_rotary_factor"}
        return rope

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies; the same value as `rope_parameters["rope_theta"]`."""
        return self.rope_parameters["rope_theta"]  # type: ignore[index]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = {**(self.rope_parameters or {}), "rope_theta": value}

    @property
    def partial_rotary_factor(self) -> float:
        """Share of each head that rotates; the same value as `rope_parameters["partial_rotary_factor"]`."""
        return self.rope_parameters["partial_rotary_factor"]  # type: ignore[index]

    @partial_rotary_factor.setter
    def partial_rotary_factor(self, value: float) -> None:
        self.rope_parameters = {**(self.rope_parameters or {}), "partial_rotary_factor": value}

    @property
    def rotary_dim(self) -> int:
        """Channels of each head that rotate; an odd product is rounded up to the next even one, as upstream does."""
        width = int(self.head_dim * self.partial_rotary_factor)  # type: ignore[operator]
        return width + width % 2

    # --- attention weights -----------------------------------------------------------------------------------

    @property
    def output_attentions(self) -> bool:
        """Whether attention weights are returned by default. Works with every attention implementation here."""
        return bool(self._output_attentions)

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        self._output_attentions = bool(value)

    def eager_copy(self) -> NemotronConfig:
        """A shallow copy with eager attention, the one implementation that returns attention weights."""
        twin = copy.copy(self)
        twin._attn_implementation = "eager"
        return twin

    def bidirectional_copy(self) -> NemotronConfig:
        """A shallow copy whose attention reads both sides."""
        twin = copy.copy(self)
        twin.is_causal = False
        return twin

    # --- checks ----------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Called by transformers before saving; its own check of `output_attentions` does not apply here."""
        self.validate_token_ids()
        self.validate_rope()
        self.validate_shapes()

    def validate_shapes(self) -> None:
        """Refuse impossible shapes.

        Raises:
            ValueError: names the field, its value, and what would be right.
        """
        _require_positive(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
        )
        if not isinstance(self.num_hidden_layers, int) or self.num_hidden_layers < 0:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers!r}; it must be a whole number, 0 or more")
        both_ways = getattr(self, "bidirectional_layers", None)
        if both_ways is not None and (type(both_ways) is not int or not 0 <= both_ways <= self.num_hidden_layers):
            raise ValueError(
                f"bidirectional_layers is {both_ways!r}; it must be a whole number, 0 to {self.num_hidden_layers}"
            )
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:  # type: ignore[operator]
            raise ValueError(
                f"num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({groups}); "
                f"each key/value head serves the same number of query heads"
            )
        _require_number("partial_rotary_factor", self.partial_rotary_factor, low=0, high=1)
        _require_number("attention_dropout", self.attention_dropout, low=0, high=1)
        _require_number("initializer_range", self.initializer_range, low=0)
        _require_number("rope_theta", self.rope_theta, above=0)
        _require_number("norm_eps", self.norm_eps, above=0)
        check_rope(self.rope_parameters, self.head_dim)  # type: ignore[arg-type]
        if self.rotary_dim > self.head_dim:  # type: ignore[operator]
            raise ValueError(
                f"head_dim {self.head_dim} with partial_rotary_factor {self.partial_rotary_factor} rotates "
                f"{self.rotary_dim} channels, more than a head has; rotated channels come in pairs"
            )
        if isinstance(self.pad_token_id, int) and self.pad_token_id >= self.vocab_size:
            raise ValueError(f"pad_token_id is {self.pad_token_id}; it must be below vocab_size ({self.vocab_size})")

    # --- saving ----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Keys of transformers 5 and of transformers 4 side by side, so that readers of either see the same model."""
        return self._with_old_spellings(super().to_dict())

    def to_diff_dict(self) -> dict[str, Any]:
        """`to_dict` without what every config has by default; `save_pretrained` writes this."""
        # Shapes are always written: a reader with other defaults must not guess them.
        out = {**{name: getattr(self, name) for name in _ALWAYS_SAVED}, **super().to_diff_dict()}
        if out.get("dtype") is not None:
            out["torch_dtype"] = out["dtype"]
        return self._with_old_spellings(out)

    def _with_old_spellings(self, out: dict[str, Any]) -> dict[str, Any]:
        rope = dict(out.get("rope_parameters") or self.rope_parameters or {})
        out["rope_theta"] = rope["rope_theta"]
        out["partial_rotary_factor"] = rope["partial_rotary_factor"]
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        if scaling.get("rope_type", "default") != "default":
            # `type` as well as `rope_type`: mlx-lm and old transformers read the former.
            out["rope_scaling"] = {"type": scaling["rope_type"], **scaling}
        if callable(self.hidden_act):
            out["hidden_act"] = _callable_name(self.hidden_act)
        return out

    # --- arithmetic ------------------------------------------------------------------------------------------

    def parameter_counts(self) -> dict[str, int]:
        """Parameters per part of the causal language model: embedding, attention, mlp, norms, lm_head (0 if tied)."""
        return describe(self).parameter_counts()

    def num_parameters(self) -> int:
        """Parameters of the causal language model; tied embeddings are counted once."""
        return describe(self).num_parameters()

    def num_non_embedding_parameters(self) -> int:
        """Parameters without the embedding and the LM head, as the Minitron paper counts "non-emb" (Table 2)."""
        return describe(self).num_non_embedding_parameters()

    def parameters_read_per_token(self) -> int:
        """Weights that decoding one token reads: all matrices and norms, and one row of the embedding."""
        return describe(self).parameters_read_per_token()

    def flops_per_token(self, context: int = 0) -> int:
        """Operations of one token's forward pass that attends to `context` tokens; a multiply-add counts as two."""
        return describe(self).flops_per_token(context)

    def training_flops_per_token(
        self, sequence: int, teacher: NemotronConfig | None = None, corrected: bool = False
    ) -> int:
        """Operations of training on a token; see `shapes.Shape.training_flops_per_token`."""
        other = None if teacher is None else describe(teacher)
        return describe(self).training_flops_per_token(sequence, other, corrected)

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> float:
        """Bytes of keys and values that one token adds to the cache, over all layers."""
        return describe(self).kv_bytes_per_token(bytes_per_value)


def config_class(family: Family) -> type[Any]:
    """The class of a family's configurations: `NemotronConfig`, or transformers' own."""
    if family.model_type == NemotronConfig.model_type:
        return NemotronConfig
    return getattr(transformers, f"{family.architecture.removesuffix('ForCausalLM')}Config")


_ALWAYS_SAVED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "norm_eps",
    "attention_bias",
    "mlp_bias",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def _require_positive(**fields: Any) -> None:
    for name, value in fields.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number of at least 1")


def _require_dict(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise ValueError(f"{name} is {value!r}; it must be a dictionary with the key rope_type")
    return dict(value or {})


def _require_number(
    name: str, value: Any, low: float | None = None, above: float | None = None, high: float = math.inf
) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if (
        number
        and math.isfinite(value)
        and (low is None or value >= low)
        and (above is None or value > above)
        and value <= high
    ):
        return
    bounds = (
        f"greater than {above}" if low is None else f"from {low} to {high}" if high < math.inf else f"{low} or more"
    )
    raise ValueError(f"{name} is {value!r}; it must be a number {bounds}")


def _agreed(old: str, old_value: Any, new: str, new_value: Any, default: Any) -> Any:
    """The value of a field given in an old spelling, refusing one that contradicts the field itself."""
    if new_value != default and new_value != old_value:
        raise ValueError(f"{old} is {old_value!r} but {new} is {new_value!r}; they are two names of one field")
    return old_value


def _callable_name(function: Callable) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', type(function).__module__)}.{name}"
