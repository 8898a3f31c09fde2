"""The shape of one model of any family, and arithmetic on it: parameters, bytes, FLOPs. Uses no tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .families import EMBEDDING, HEAD, LAYER, Axis, Family, Part, Role, family_of
from .rope_parameters import check_rope

PARTS = ("embedding", "attention", "mlp", "norms", "lm_head")
"""What parameters are counted by."""


@dataclass(frozen=True)
class Shape:
    """The shape of one model, normalized over families, and what it costs."""

    family: Family
    layers: int
    hidden: int
    """Channels of the residual stream, D."""
    heads: int
    """Query heads."""
    groups: int
    """Key/value heads."""
    head_dim: int
    ffn: int
    """Neurons of the MLP, F."""
    vocab: int
    """Rows of the embedding and of the LM head."""
    max_positions: int
    activation: str | Callable
    """`hidden_act`: a name that transformers knows, or a function from tensor to tensor."""
    norm_eps: float
    rotary_dim: int
    """Channels of each head that rotate: the first ones. Even."""
    rope: Mapping[str, Any]
    """`rope_parameters`: `rope_type`, `rope_theta`, and what the type needs."""
    tied: bool
    """The LM head is the embedding."""
    biased: frozenset[Role]
    """Roles of the modules that have a bias."""

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""
        return self.rope["rope_theta"]

    def size(self, axis: Axis) -> int:
        """Length of an axis."""
        return {
            "channels": self.hidden,
            "queries": self.heads * self.head_dim,
            "keys": self.groups * self.head_dim,
            "neurons": self.ffn,
            "head_dim": self.head_dim,
            "vocabulary": self.vocab,
        }[axis]

    def part_shapes(self, part: Part) -> Iterator[tuple[str, tuple[int, ...]]]:
        """("weight" or "bias", shape) of a module's parameters."""
        rows = self.size(part.rows)
        yield "weight", (rows,) if part.columns is None else (rows, self.size(part.columns))
        if part.role in self.biased:
            yield "bias", (rows,)

    @cached_property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter of the causal language model, in file order, with its shape.

        Without `lm_head.weight` if embeddings are tied.
        """
        prefixes = [(EMBEDDING, "")]
        prefixes += [(part, LAYER.format(layer=i)) for i in range(self.layers) for part in self.family.layer]
        prefixes += [(self.family.final_norm, ""), *([] if self.tied else [(HEAD, "")])]
        return {
            f"{prefix}{part.name}.{kind}": shape for part, prefix in prefixes for kind, shape in self.part_shapes(part)
        }

    # --- arithmetic --------------------------------------------------------------------------------------------------

    def parameter_counts(self) -> dict[str, int]:
        """Parameters per part of the causal language model: embedding, attention, mlp, norms, lm_head (0 if tied)."""
        counts: dict[str, int] = dict.fromkeys(PARTS, 0)
        for part in self.family.parts:
            size = sum(math.prod(shape) for _, shape in self.part_shapes(part))
            counts[_COUNTED_AS[part.role]] += size * (self.layers if part in self.family.layer else 1)
        if self.tied:
            counts["lm_head"] = 0
        return counts

    def num_parameters(self) -> int:
        """Parameters of the causal language model; tied embeddings are counted once."""
        return sum(self.parameter_counts().values())

    def num_non_embedding_parameters(self) -> int:
        """Parameters without the embedding and the LM head, as the Minitron paper counts "non-emb" (Table 2)."""
        counts = self.parameter_counts()
        return counts["attention"] + counts["mlp"] + counts["norms"]

    def parameters_read_per_token(self) -> int:
        """Weights that decoding one token reads: all matrices and norms, and one row of the embedding."""
        counts = self.parameter_counts()
        head = counts["lm_head"] or counts["embedding"]
        return counts["attention"] + counts["mlp"] + counts["norms"] + head + self.hidden

    def flops_per_token(self, context: int = 0) -> int:
        """Operations of one token's forward pass that attends to `context` tokens; a multiply-add counts as two."""
        counts = self.parameter_counts()
        matrices = counts["attention"] + counts["mlp"] + (counts["lm_head"] or counts["embedding"])
        attended = 2 * self.heads * self.head_dim * context
        return 2 * (matrices + self.layers * attended)

    def training_flops_per_token(self, sequence: int, teacher: Shape | None = None, corrected: bool = False) -> int:
        """Operations of training on a token: three forward passes of this model, and one of a teacher.

        A token attends to half a sequence on average. What is computed twice to save memory is not counted, as is
        usual for MFU.

        Args:
            sequence: tokens of a sequence.
            teacher: a teacher that runs beside this model.
            corrected: whether the teacher is trained too, which takes three passes of it.
        """
        passes = 3 * self.flops_per_token(sequence // 2)
        if teacher is not None:
            passes += (3 if corrected else 1) * teacher.flops_per_token(sequence // 2)
        return passes

    def kv_bytes_per_token(self, bytes_per_value: float = 2) -> float:
        """Bytes of keys and values that one token adds to the cache, over all layers."""
        return 2 * self.layers * self.size("keys") * bytes_per_value


_COUNTED_AS: dict[Role, str] = {
    **dict.fromkeys(("attention_norm", "query_norm", "key_norm", "mlp_norm", "final_norm"), "norms"),
    **dict.fromkeys(("query", "key", "value", "output"), "attention"),
    **dict.fromkeys(("gate", "up", "down"), "mlp"),
    "embedding": "embedding",
    "head": "lm_head",
}  # type: ignore[dict-item]


def describe(config: Any) -> Shape:
    """The shape that a configuration of any family in the table gives.

    Args:
        config: `NemotronConfig`, or transformers' own configuration of another family.

    Raises:
        ValueError: another architecture; rotary parameters, head sizes or sliding windows that minitron does not
            compute with. The message names the field, its value and what would be right.
    """
    family = family_of(config)
    _check_window(config, family)
    hidden, heads = config.hidden_size, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    rope, width = _rope(config, family, head_dim)
    return Shape(
        family=family,
        layers=config.num_hidden_layers,
        hidden=hidden,
        heads=heads,
        groups=config.num_key_value_heads,
        head_dim=head_dim,
        ffn=config.intermediate_size,
        vocab=config.vocab_size,
        max_positions=config.max_position_embeddings,
        activation=config.hidden_act,
        norm_eps=getattr(config, family.norm.eps),
        rotary_dim=width + width % 2,
        rope=rope,
        tied=bool(config.tie_word_embeddings),
        biased=frozenset(part.role for part in family.parts if _has_bias(part, config)),
    )


def training_flops_per_token(config: Any, sequence: int, teacher: Any = None, corrected: bool = False) -> int:
    """`Shape.training_flops_per_token` of configurations."""
    return describe(config).training_flops_per_token(
        sequence, None if teacher is None else describe(teacher), corrected
    )


def _has_bias(part: Part, config: Any) -> bool:
    return bool(getattr(config, part.bias)) if isinstance(part.bias, str) else part.bias


def _rope(config: Any, family: Family, head_dim: int) -> tuple[dict[str, Any], int]:
    """Rotary parameters with a type, a base and a share, and how many channels of a head rotate."""
    rope = dict(config.rope_parameters or {})
    if family.rotary_share is None:  # its configuration has checked and completed them
        return rope, int(head_dim * rope["partial_rotary_factor"])
    share = rope.setdefault("partial_rotary_factor", family.rotary_share)
    if share != family.rotary_share:
        raise ValueError(f"partial_rotary_factor is {share!r}; {family.title} rotates all channels of a head (1.0)")
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; {family.title} rotates pairs of channels, so it must be even")
    rope.setdefault("rope_type", "default")
    check_rope(rope, head_dim)
    return rope, head_dim


def _check_window(config: Any, family: Family) -> None:
    kinds = getattr(config, "layer_types", None) or []
    other = [kind for kind in kinds if kind != "full_attention"]
    window, context = getattr(config, "sliding_window", None), config.max_position_embeddings
    if family.windowed and window is not None and window < context:
        raise ValueError(
            f"sliding_window is {window} and max_position_embeddings is {context}: tokens would not see all tokens "
            f"before them. Set max_position_embeddings to {window} in config.json to use the model for texts of up to "
            f"{window} tokens, for which the window makes no difference"
        )
    if other:
        advice = ""
        if other[0] == "sliding_attention" and window is not None:
            advice = (
                f". Set use_sliding_window to false, remove layer_types and set max_position_embeddings to {window} in "
                f"config.json to use the model for texts of up to {window} tokens, for which the window makes no "
                f"difference"
            )
        raise ValueError(
            f"layer_types has {other[0]!r:.40} in {len(other)} of {len(kinds)} layers; every layer must be "
            f"'full_attention'{advice}"
        )
