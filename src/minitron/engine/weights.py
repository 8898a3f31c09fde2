"""The weights of a causal language model in the form that decoding reads: each matrix in rows, each row once.

All matrices of a model are in one of the formats of `quantize`, the embedding too; the head's is `head_format`.

`down_proj` is stored transposed, so that one MLP neuron is one contiguous row that can be skipped; gains of the norms
are `1 + weight` in fp32. Packed from a model in memory (whose other matrices are shared, not copied) or straight from
a checkpoint on disk. Letters of shapes: D hidden, N query heads, K key/value heads, H head_dim, F MLP neurons,
V vocabulary, S positions, R rotated channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .. import pages
from ..checkpoint.hf import open_hf
from ..checkpoint.tensors import LazyTensor
from ..config import NemotronConfig
from ..head_pruning import kept_heads
from ..model import NemotronForCausalLM, NemotronRotaryEmbedding
from ..quantize import HEAD_FORMATS, PLAIN, Format, Matrix, pack, pack_blocks, row_bytes

WEIGHT_DTYPES = (torch.bfloat16, torch.float32)
"""What the decode kernels read where nothing is packed. The reference takes any floating dtype."""


@dataclass
class Norm:
    """Layer norm: `gain` (1 + the stored weight) and `offset`, both (D,) fp32."""

    gain: Tensor
    offset: Tensor


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
    down_t: Matrix
    """(F, D): row f is what neuron f adds to the residual stream."""
    qkv_bias: Tensor | None
    o_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """All six."""
        return self.q, self.k, self.v, self.o, self.up, self.down_t


@dataclass
class EngineWeights:
    """A whole model. `embed` and `head` are (V, D), the same tensor if they are tied.

    `format` is that of all matrices but the head (and a tied embedding): one of `quantize.FORMATS`, or for the
    reference engine "fp16" or "fp64".
    """

    config: NemotronConfig
    format: str
    embed: Matrix
    head: Matrix
    norm: Norm
    layers: list[LayerWeights]

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values, and of torch's matrix products: that of plain matrices, otherwise bf16."""
        return PLAIN.get(self.format, torch.bfloat16)

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices; tied ones are counted once."""
        found = (self.embed, self.head, *(m for x in self.layers for m in x.matrices))
        return sum(matrix.nbytes for matrix in {matrix.data.data_ptr(): matrix for matrix in found}.values())

    def bytes_per_token(self, active: float = 1.0) -> float:
        """Bytes of weights that decoding one token reads when the share `active` of MLP neurons is not zero."""
        dense = sum(m.nbytes for layer in self.layers for m in layer.matrices[:-1]) + self.head.nbytes
        return dense + active * sum(layer.down_t.nbytes for layer in self.layers)

    def rotary_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines (S, R / 2) fp32 for positions 0 to S - 1, from the model's own frequencies."""
        rotary = NemotronRotaryEmbedding(self.config)
        like = torch.empty(0, dtype=torch.float32)
        cos, sin = rotary(like, torch.arange(positions)[None])
        half = cos.shape[-1] // 2
        return cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()


def head_format(format: str) -> str:
    """The format of the LM head where the other matrices have `format`."""
    return HEAD_FORMATS.get(format, format)


def packed_bytes(config: NemotronConfig, format: Format) -> int:
    """Bytes that the matrices of a model will take, but for bf12's escapes (below a percent for real weights)."""
    D, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    H: int = config.head_dim  # type: ignore[assignment]

    def size(rows: int, columns: int, format: str = format) -> int:
        return rows * row_bytes(format, columns) + (8 * rows + 4 if format == "bf12" else 0)

    total = size(V, D, head_format(format)) + (0 if config.tie_word_embeddings else size(V, D))
    for index in range(config.num_hidden_layers):
        heads, groups = kept_heads(config, index)
        total += size(heads * H, D) + 2 * size(groups * H, D) + size(D, heads * H) + 2 * size(F, D)
    return total


def from_model(model: NemotronForCausalLM, format: Format | None = None) -> EngineWeights:
    """Pack a model on the CPU.

    Args:
        model: its matrices are shared, but for `down_proj`, if the format is that of their dtype.
        format: that of the model's dtype if None.

    Raises:
        ValueError: see `quantize.pack`.
    """
    tensors = {name: value.detach() for name, value in model.named_parameters(remove_duplicate=False)}
    chosen = format or format_of(model.model.embed_tokens.weight.dtype)
    return _pack(
        model.config,
        lambda name: tensors.get(name),
        lambda matrix: pack(pages.empty((matrix.shape[1], matrix.shape[0]), matrix.dtype).copy_(matrix.T), chosen),  # type: ignore[arg-type]
        lambda matrix, format: pack(matrix, format),
        chosen,
    )


def format_of(dtype: torch.dtype) -> str:
    """The plain format of a dtype."""
    return next(name for name, found in PLAIN.items() if found == dtype)


def from_checkpoint(folder: Path, format: Format | None = None) -> EngineWeights:
    """Pack a Hugging Face folder tensor by tensor; memory stays at that of the packed weights and one block.

    Args:
        folder: see `checkpoint.hf.open_hf`.
        format: that of the checkpoint's dtype if None.

    Raises:
        CheckpointError: something is missing or wrong with the folder.
        ValueError: see `quantize.pack`.
    """
    checkpoint = open_hf(folder)
    chosen = format or format_of(checkpoint.tensors["model.embed_tokens.weight"].dtype)

    def rows(lazy: LazyTensor, format: str) -> Matrix:
        return pack_blocks(lazy.blocks(), (lazy.shape[0], lazy.shape[1]), format)

    def transposed(lazy: LazyTensor) -> Matrix:
        out = pages.empty((lazy.shape[1], lazy.shape[0]), PLAIN.get(chosen, lazy.dtype))
        start = 0
        for block in lazy.blocks():
            out[:, start : start + len(block)] = block.T
            start += len(block)
        return pack(out, chosen)  # type: ignore[arg-type]

    return _pack(checkpoint.config, checkpoint.tensors.get, transposed, rows, chosen)


def _pack(
    config: NemotronConfig,
    get: Callable[[str], Tensor | LazyTensor | None],
    transposed: Callable[..., Matrix],
    rows: Callable[..., Matrix],
    format: str,
) -> EngineWeights:
    def matrix(name: str, format: str = format) -> Matrix:
        found = get(name)
        assert found is not None, name
        return rows(found, format)

    def bias(*names: str) -> Tensor | None:
        parts = [get(name) for name in names]
        if parts[0] is None:
            return None
        return torch.cat([_fp32(part) for part in parts])

    def norm(name: str) -> Norm:
        return Norm(_fp32(get(f"{name}.weight")) + 1.0, _fp32(get(f"{name}.bias")))

    layers = []
    for index in range(config.num_hidden_layers):
        at, heads = f"model.layers.{index}.", kept_heads(config, index)
        attn, mlp = f"{at}self_attn.", f"{at}mlp."
        down = get(f"{mlp}down_proj.weight")
        layers.append(
            LayerWeights(
                *heads,
                attention_norm=norm(f"{at}input_layernorm"),
                **{name: matrix(f"{attn}{name}_proj.weight") for name in "qkvo"},
                mlp_norm=norm(f"{at}post_attention_layernorm"),
                up=matrix(f"{mlp}up_proj.weight"),
                down_t=transposed(down),
                qkv_bias=bias(*(f"{attn}{name}_proj.bias" for name in "qkv")),
                o_bias=bias(f"{attn}o_proj.bias"),
                up_bias=bias(f"{mlp}up_proj.bias"),
                down_bias=bias(f"{mlp}down_proj.bias"),
            )
        )
    tied = config.tie_word_embeddings
    embed = matrix("model.embed_tokens.weight", head_format(format) if tied else format)
    head = embed if tied else matrix("lm_head.weight", head_format(format))
    return EngineWeights(config, format, embed, head, norm("model.norm"), layers)


def _fp32(tensor: Tensor | LazyTensor | None) -> Tensor:
    assert tensor is not None
    return (tensor.load() if isinstance(tensor, LazyTensor) else tensor).float().clone()
