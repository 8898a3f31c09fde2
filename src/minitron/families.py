"""What an architecture is made of, as data: Nemotron, Llama, Mistral, Qwen2 and Qwen3.

One `Family` for each architecture says which modules a decoder layer has, which axis of the model their rows and
columns belong to, where biases come from, and how norms, MLP and rotary embedding compute. Whatever works on parameters
by name asks here; `shapes.describe` reads one configuration by this table, and `supported` refuses what is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Axis = Literal["channels", "queries", "keys", "neurons", "head_dim", "vocabulary"]
"""What the rows or columns of a parameter are: channels of the residual stream, query heads times head_dim, key/value
heads times head_dim, MLP neurons, the channels of one head, or tokens."""

Role = Literal[
    "embedding", "attention_norm", "query", "key", "value", "query_norm", "key_norm", "output",
    "mlp_norm", "gate", "up", "down", "final_norm", "head",
]  # fmt: skip
"""What a module does, whatever a family calls it."""

LAYER = "model.layers.{layer}."
"""Prefix of the parameters of one decoder layer of a causal language model."""


@dataclass(frozen=True)
class Part:
    """A module with parameters."""

    role: Role
    name: str
    """Below the decoder layer, such as `mlp.up_proj`; the whole name outside the layers, such as `model.norm`."""
    rows: Axis
    columns: Axis | None = None
    """None: a norm, which has one weight for each row."""
    bias: bool | str = False
    """Whether it has a bias, or the field of the configuration that says so. A bias has the rows of the weight."""


@dataclass(frozen=True)
class Norm:
    """How the norms of the residual stream compute."""

    kind: Literal["layernorm1p", "rmsnorm"]
    """"layernorm1p": over mean and variance; "rmsnorm": over the mean square."""
    offset: float
    """Added to the stored weight to give the gain: 1 for LayerNorm1P, whose weights are zero-centred, else 0."""
    bias: bool
    eps: str
    """Field of the configuration."""


@dataclass(frozen=True)
class Family:
    """An architecture. Tables of parts follow the order of the parameters in a file."""

    title: str
    """For people."""
    model_type: str
    architecture: str
    """The class of its causal language model; transformers' own, except for Nemotron."""
    gguf: str
    """`general.architecture` of llama.cpp's files."""
    norm: Norm
    layer: tuple[Part, ...]
    """Modules of a decoder layer."""
    rotary_share: float | None
    """Share of a head's channels that rotate; None: `partial_rotary_factor` says so."""
    tied: bool
    """Default of `tie_word_embeddings`."""
    hidden_multiple_of_heads: bool = False
    """transformers refuses a `hidden_size` that is no multiple of `num_attention_heads`."""
    windowed: bool = False
    """`sliding_window` holds for every layer; otherwise `layer_types` says for which, if there are such keys."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """All modules: the embedding, those of a layer, the final norm and the LM head."""
        return (EMBEDDING, *self.layer, self.final_norm, HEAD)

    @property
    def final_norm(self) -> Part:
        """The norm before the LM head."""
        return Part("final_norm", "model.norm", "channels", bias=self.norm.bias)

    def part(self, role: Role) -> Part:
        """The module with that role.

        Raises:
            KeyError: the family has none; see `has`.
        """
        found = next((part for part in self.parts if part.role == role), None)
        if found is None:
            raise KeyError(f"{self.title} has no {role}")
        return found

    def has(self, role: Role) -> bool:
        """Whether there is a module with that role."""
        return any(part.role == role for part in self.parts)

    @property
    def gated(self) -> bool:
        """Whether the MLP is `down(act(gate(x)) * up(x))`; otherwise it is `down(act(up(x)))`."""
        return self.has("gate")

    @property
    def tensor_parallel_plan(self) -> dict[str, str]:
        """transformers' `base_model_tp_plan`: split by heads and neurons, below the backbone."""
        plan = {}
        for part in self.layer:
            if part.rows in _SPLIT:
                plan[f"layers.*.{part.name}"] = "colwise"
            elif part.columns in _SPLIT:
                plan[f"layers.*.{part.name}"] = "rowwise"
            elif part.rows == "head_dim":
                plan[f"layers.*.{part.name}"] = "replicated_with_grad_allreduce"
        return plan


_SPLIT = ("queries", "keys", "neurons")

EMBEDDING = Part("embedding", "model.embed_tokens", "vocabulary", "channels")
HEAD = Part("head", "lm_head", "vocabulary", "channels")


def _attention(norm: Norm, inputs: bool | str, output: bool | str, head_norms: bool = False) -> tuple[Part, ...]:
    """The norms and the attention; `inputs` and `output` say whether q, k, v and o have biases."""
    norms = (
        Part("query_norm", "self_attn.q_norm", "head_dim"),
        Part("key_norm", "self_attn.k_norm", "head_dim"),
    )
    return (
        Part("attention_norm", "input_layernorm", "channels", bias=norm.bias),
        Part("mlp_norm", "post_attention_layernorm", "channels", bias=norm.bias),
        Part("query", "self_attn.q_proj", "queries", "channels", inputs),
        Part("key", "self_attn.k_proj", "keys", "channels", inputs),
        Part("value", "self_attn.v_proj", "keys", "channels", inputs),
        *(norms if head_norms else ()),
        Part("output", "self_attn.o_proj", "channels", "queries", output),
    )


def _mlp(gated: bool, bias: bool | str) -> tuple[Part, ...]:
    gate = (Part("gate", "mlp.gate_proj", "neurons", "channels", bias),)
    return (
        *(gate if gated else ()),
        Part("up", "mlp.up_proj", "neurons", "channels", bias),
        Part("down", "mlp.down_proj", "channels", "neurons", bias),
    )


_LAYERNORM_1P = Norm("layernorm1p", offset=1.0, bias=True, eps="norm_eps")
_RMS_NORM = Norm("rmsnorm", offset=0.0, bias=False, eps="rms_norm_eps")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            *("Nemotron", "nemotron", "NemotronForCausalLM", "nemotron"),
            norm=_LAYERNORM_1P,
            layer=(*_attention(_LAYERNORM_1P, "attention_bias", "attention_bias"), *_mlp(False, "mlp_bias")),
            rotary_share=None,
            tied=False,
        ),
        Family(
            *("Llama", "llama", "LlamaForCausalLM", "llama"),
            norm=_RMS_NORM,
            layer=(*_attention(_RMS_NORM, "attention_bias", "attention_bias"), *_mlp(True, "mlp_bias")),
            rotary_share=1.0,
            tied=False,
            hidden_multiple_of_heads=True,
        ),
        Family(
            *("Mistral", "mistral", "MistralForCausalLM", "llama"),
            norm=_RMS_NORM,
            layer=(*_attention(_RMS_NORM, False, False), *_mlp(True, False)),
            rotary_share=1.0,
            tied=False,
            windowed=True,
        ),
        Family(
            *("Qwen2", "qwen2", "Qwen2ForCausalLM", "qwen2"),
            norm=_RMS_NORM,
            layer=(*_attention(_RMS_NORM, True, False), *_mlp(True, False)),
            rotary_share=1.0,
            tied=False,
        ),
        Family(
            *("Qwen3", "qwen3", "Qwen3ForCausalLM", "qwen3"),
            norm=_RMS_NORM,
            layer=(*_attention(_RMS_NORM, "attention_bias", "attention_bias", head_norms=True), *_mlp(True, False)),
            rotary_share=1.0,
            tied=False,
        ),
    )
}
"""`model_type` to what it is made of."""

SUPPORTED = ", ".join(family.architecture for family in FAMILIES.values())


def family_of(config: Any) -> Family:
    """The family of a configuration.

    Raises:
        ValueError: its `model_type` is not in the table; the message lists those that are.
    """
    kind = getattr(config, "model_type", None)
    found = FAMILIES.get(kind) if isinstance(kind, str) else None
    if found is None:
        raise ValueError(f"model_type is {kind!r}; the architectures that minitron works with are {SUPPORTED}")
    return found
