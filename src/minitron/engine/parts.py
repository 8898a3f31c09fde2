"""The weights of a causal language model in the form that decoding reads: contiguous rows, each read once.

All matrices of a model are in one of the formats of `engine.matrix`, the embedding too; the head's is `head_format`.
Nemotron's `down_proj` is stored transposed, so that one MLP neuron is one contiguous row that can be skipped; neurons
of a gated MLP are hardly ever zero, and its `down_proj` stays as it is. Gains of the norms are what normalized values
are multiplied with, in fp32. `engine.weights` makes the weights from a model in memory or a checkpoint on disk;
importing this file does not import torch. Letters of shapes: D hidden, N query heads, K key/value heads, H head_dim,
F MLP neurons, V vocabulary, S positions, R rotated channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .buffers import Buffer, of_kind
from .matrix import HEAD_FORMATS, PLAIN_BYTES, Matrix

if TYPE_CHECKING:
    import torch


@dataclass
class Norm:
    """Layer norm: `gain` (Nemotron: 1 + the stored weight) and `offset`, both (D,) fp32. RMSNorm has no offset."""

    gain: Buffer
    offset: Buffer | None


@dataclass
class Constants:
    """What the computation needs besides weights."""

    num_layers: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    tied: bool
    """Whether the head is the embedding."""
    inv_freq: np.ndarray
    """Of the rotation, fp32 (R / 2,)."""
    attention_scaling: float
    """Factor on the cosines and sines of the rotation."""
    gated: bool = False
    """Whether the MLP is `down(silu(gate(x)) * up(x))`; otherwise it is `down(relu(up(x)) ** 2)`."""
    norm_offset: float = 1.0
    """Added to the stored weights of norms."""


@dataclass
class LayerWeights:
    """One decoder layer. Matrices are (outputs, inputs), biases fp32 or None."""

    num_heads: int
    num_key_value_heads: int
    attention_norm: Norm
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    mlp_norm: Norm
    up: Matrix
    down: Matrix
    """(D, F); without a gate its transpose (F, D), whose row f is what neuron f adds to the residual stream."""
    qkv_bias: Buffer | None
    o_bias: Buffer | None
    up_bias: Buffer | None
    down_bias: Buffer | None
    gate: Matrix | None = None
    gate_bias: Buffer | None = None
    query_norm: Buffer | None = None
    """Gain (H,) fp32 of the RMSNorm of each query head before rotation; None if there is none."""
    key_norm: Buffer | None = None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All six, or seven with the gate."""
        return self.q, self.k, self.v, self.o, self.up, self.down, *([] if self.gate is None else [self.gate])


@dataclass
class EngineWeights:
    """A whole model. `embed` and `head` are (V, D), the same matrix if they are tied.

    `format` is that of all matrices but the head (and a tied embedding): one of `engine.matrix.FORMATS`, or for the
    reference engine "fp16" or "fp64".
    """

    constants: Constants
    format: str
    embed: Matrix
    head: Matrix
    norm: Norm
    layers: list[LayerWeights]

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.embed.shape[1]

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.embed.shape[0]

    @property
    def plain_format(self) -> str:
        """The format of keys and values, and of torch's matrix products: that of plain matrices, otherwise bf16."""
        return self.format if self.format in PLAIN_BYTES else "bf16"

    @property
    def dtype(self) -> torch.dtype:
        """`plain_format` as a dtype of torch."""
        import torch

        return {"fp32": torch.float32, "fp16": torch.float16, "fp64": torch.float64}.get(self.format, torch.bfloat16)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices; tied ones are counted once."""
        found = (self.embed, self.head, *(m for x in self.layers for m in x.matrices))
        return sum(matrix.nbytes for matrix in {id(matrix): matrix for matrix in found}.values())

    def bytes_per_token(self, active: float = 1.0) -> float:
        """Bytes of weights that decoding one token reads when the share `active` of MLP neurons is not zero."""
        every = sum(matrix.nbytes for layer in self.layers for matrix in layer.matrices) + self.head.nbytes
        skippable = 0 if self.constants.gated else sum(layer.down.nbytes for layer in self.layers)
        return every - (1 - active) * skippable

    def rotary_tables(self, positions: int) -> tuple[Buffer, Buffer]:
        """Cosines and sines (S, R / 2) fp32 for positions 0 to S - 1."""
        scaling, like = np.float32(self.constants.attention_scaling), self.embed.data
        angles = np.arange(positions, dtype=np.float32)[:, None] * self.constants.inv_freq
        return of_kind(np.cos(angles) * scaling, like), of_kind(np.sin(angles) * scaling, like)


def frequencies(rotary_dim: int, theta: float) -> np.ndarray:
    """Inverse frequencies `theta ** (-2i / rotary_dim)` of an unscaled rotation, fp32 (ceil(R / 2),).

    The power is computed in float64, so the numbers are the same whichever library computes them.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(max(rotary_dim, 1))
    return np.float32(1) / np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)


def head_format(format: str) -> str:
    """The format of the LM head where the other matrices have `format`."""
    return HEAD_FORMATS.get(format, format)


EMBEDDING, HEAD, NORM = "model.embed_tokens", "lm_head", "model.norm"
DOWN = "mlp.down_proj.weight"


class Source(Protocol):
    """Where `assemble` gets a model's tensors from, by their names in a checkpoint."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None if the model has none of that name."""

    def vector(self, name: str) -> np.ndarray:
        """A vector in fp32."""
        ...

    def rows(self, name: str, format: str) -> Matrix:
        """A matrix in a format."""
        ...

    def transposed(self, name: str, format: str) -> Matrix:
        """A transposed matrix in a format.

        Raises:
            NotFiniteError: some of its numbers are NaN or infinite.
        """
        ...


def assemble(constants: Constants, source: Source, format: str) -> EngineWeights:
    """All weights of a model in a format."""

    def height(module: str) -> int:
        shape = source.shape(f"{module}.weight")
        assert shape is not None, module
        return shape[0]

    embed = source.rows(f"{EMBEDDING}.weight", head_format(format) if constants.tied else format)

    def bias(*modules: str) -> Buffer | None:
        given = [source.shape(f"{module}.bias") is not None for module in modules]
        if not any(given):
            return None
        pairs = zip(modules, given, strict=True)
        parts = [source.vector(f"{x}.bias") if is_given else np.zeros(height(x), np.float32) for x, is_given in pairs]
        return of_kind(np.concatenate(parts), embed.data)

    def norm(module: str) -> Norm:
        gain = source.vector(f"{module}.weight") + np.float32(constants.norm_offset)
        return Norm(of_kind(gain, embed.data), bias(module))

    def gain_of_heads(module: str) -> Buffer | None:
        name = f"{module}.weight"
        return None if source.shape(name) is None else of_kind(source.vector(name), embed.data)

    layers = []
    for index in range(constants.num_layers):
        at = f"model.layers.{index}."
        attn, mlp = f"{at}self_attn.", f"{at}mlp."
        layers.append(
            LayerWeights(
                height(f"{attn}q_proj") // constants.head_dim,
                height(f"{attn}k_proj") // constants.head_dim,
                attention_norm=norm(f"{at}input_layernorm"),
                **{name: source.rows(f"{attn}{name}_proj.weight", format) for name in "qkvo"},
                mlp_norm=norm(f"{at}post_attention_layernorm"),
                up=source.rows(f"{mlp}up_proj.weight", format),
                down=(source.rows if constants.gated else source.transposed)(f"{at}{DOWN}", format),
                qkv_bias=bias(*(f"{attn}{name}_proj" for name in "qkv")),
                o_bias=bias(f"{attn}o_proj"),
                up_bias=bias(f"{mlp}up_proj"),
                down_bias=bias(f"{mlp}down_proj"),
                gate=source.rows(f"{mlp}gate_proj.weight", format) if constants.gated else None,
                gate_bias=bias(f"{mlp}gate_proj"),
                query_norm=gain_of_heads(f"{attn}q_norm"),
                key_norm=gain_of_heads(f"{attn}k_norm"),
            )
        )
    head = embed if constants.tied else source.rows(f"{HEAD}.weight", head_format(format))
    return EngineWeights(constants, format, embed, head, norm(NORM), layers)
